//! System V semaphores, messages and segments.

use harness::program::Op;

use super::raw;

const SEGMENTS: i32 = 1000;
const SEMAPHORES: i32 = 2000;
const MESSAGES: i32 = 3000;

/// What a step on them says.
pub(super) fn perform(op: &Op) -> String {
    match op {
        Op::RemoveObject(which) => match which % 7 {
            semaphores @ 0..2 => raw::remove_semaphores(SEMAPHORES + i32::from(semaphores)),
            segment @ 2..5 => raw::remove_segment(SEGMENTS + i32::from(segment) - 2),
            messages => raw::remove_messages(MESSAGES + i32::from(messages) - 5),
        }
        .to_string(),
        Op::Semaphore { key, change, undo } => {
            raw::semaphore(SEMAPHORES + i32::from(*key), i16::from(*change), *undo).to_string()
        }
        Op::Message { key, bytes } => {
            let message = vec![*bytes | 1; usize::from(*bytes)];
            raw::message(MESSAGES + i32::from(*key), i64::from(*bytes % 5) + 1, &message).to_string()
        }
        Op::Receive(key) => raw::receive(MESSAGES + i32::from(*key)),
        _ => "no such thing".into(),
    }
}

/// What they are now.
pub(super) fn describe() -> String {
    let semaphores = [0, 1].map(|n| raw::semaphore_value(SEMAPHORES + n));
    let messages = [0, 1].map(|n| raw::messages(MESSAGES + n));
    let segments = [0, 1, 2].map(|n| raw::attached(SEGMENTS + n));
    format!("semaphores {semaphores:?} messages {messages:?} segments {segments:?}")
}
