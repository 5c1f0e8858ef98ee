//! What a destination looks at before it takes a pod: who lacks something is told what.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use zap::image::FORMAT;
use zap::migrate::protocol::{Frame, GREETING, Hello, Message, VERSION, read_frame, write_message};
use zap::pod::{Bind, NetworkMode, PodSpec};

use super::common::Host;

/// A pod that could live anywhere.
fn hello() -> Hello {
    let mut spec = PodSpec::new("guest", &["true"]);
    spec.network = NetworkMode::Private;
    Hello {
        protocol: VERSION,
        format: FORMAT,
        records: Vec::new(),
        spec,
        address: None,
        any_address: false,
        former: None,
        trail: None,
        memory: 0,
        files: 0,
        strategy: "pre-copy".into(),
        store: None,
    }
}

/// What `zap receive` answers to that, and with what code it ends when it hears nothing more.
fn answer(host: &Host, hello: &Hello) -> (Message, Option<i32>) {
    let mut command: Command = host.zap(["receive"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    to.write_all(GREETING).unwrap();
    write_message(&mut to, &Message::Hello(Box::new(hello.clone()))).unwrap();
    let mut greeting = [0; GREETING.len()];
    from.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, GREETING);
    let Frame::Message(answer) = read_frame(&mut from, &mut Vec::new()).unwrap() else { panic!("bytes came") };
    drop(to);
    (answer, child.wait().unwrap().code())
}

#[test]
fn a_destination_says_what_it_lacks() {
    let host = Host::new();
    let refuses = |what: &str, change: &dyn Fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        let (answer, code) = answer(&host, &hello);
        let Message::Refused(failure) = answer else { panic!("{what}: it says {}", answer.name()) };
        assert!(failure.message.contains(what) && failure.code == 4, "{failure:?}");
        assert_eq!(code, Some(4), "{what}");
    };
    refuses("speaks version", &|hello| hello.protocol += 1);
    refuses("with images of format", &|hello| hello.format += 1);
    refuses("records of kind dream, version 1", &|hello| hello.records.push(("dream".into(), 1)));
    refuses("records of kind process, version 9999", &|hello| hello.records.push(("process".into(), 9999)));
    refuses("there is no /nowhere/root here", &|hello| hello.spec.root = "/nowhere/root".into());
    refuses("there is no /nowhere/data here", &|hello| {
        let bind = Bind { source: "/nowhere/data".into(), target: "/data".into(), read_only: false };
        hello.spec.binds.push(bind);
    });
    refuses("moves memory by magic", &|hello| hello.strategy = "magic".into());
    refuses("both hosts must see the store", &|hello| hello.store = Some("/nowhere/store".into()));
    refuses("its files take", &|hello| hello.files = 1 << 60);
    refuses("MiB of memory", &|hello| hello.memory = 1 << 60);
    let (welcome, code) = answer(&host, &hello());
    let Message::Welcome { name, offer } = welcome else { panic!("it says {}", welcome.name()) };
    assert!(name == "guest" && offer.is_some());
    assert_eq!(code, Some(1), "nothing more came");
    assert_eq!(host.ok(["ls", "--json"]), "[]");
}
