//! One target of `zap::fuzzing::TARGETS`: the one that `ZAP_TARGET` names.

#![no_main]

use std::sync::OnceLock;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("ZAP_TARGET").expect("ZAP_TARGET names one of zap::fuzzing::TARGETS");
        zap::fuzzing::target(&name).expect("it is one of zap::fuzzing::TARGETS")
    })(bytes);
});
