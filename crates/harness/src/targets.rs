//! What the system is to reach: each number with the samples that show it.

/// How samples become the number that is compared with a limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measure {
    /// The median of an arm, in microseconds, shown as milliseconds.
    MedianMs,
    /// How much larger the arm's median is than that of `base`, in percent, pair by pair.
    MorePercent {
        /// The arm compared with.
        base: &'static str,
    },
    /// How much smaller: for what is better when it is larger.
    LessPercent {
        /// The arm compared with.
        base: &'static str,
    },
    /// How much larger the arm is than `base`, in its own unit, pair by pair.
    More {
        /// The arm compared with.
        base: &'static str,
    },
}

/// A number to reach.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What it is, in words.
    pub what: &'static str,
    /// The experiment that measures it.
    pub experiment: &'static str,
    /// The workload.
    pub workload: &'static str,
    /// What is among its parameters: nothing, where it is measured with one set of them.
    pub parameters: &'static str,
    /// The arm.
    pub arm: &'static str,
    /// The metric.
    pub metric: &'static str,
    /// How it is computed.
    pub measure: Measure,
    /// At most this much.
    pub limit: f64,
}

impl Target {
    /// The unit of the number and of the limit.
    pub fn unit(&self) -> &'static str {
        match self.measure {
            Measure::MedianMs => "ms",
            Measure::MorePercent { .. } | Measure::LessPercent { .. } => "%",
            Measure::More { .. } => "ns",
        }
    }
}

const fn time(
    what: &'static str,
    workload: &'static str,
    arm: &'static str,
    metric: &'static str,
    limit: f64,
) -> Target {
    Target {
        what,
        experiment: "checkpoint-restart",
        workload,
        parameters: "",
        arm,
        metric,
        measure: Measure::MedianMs,
        limit,
    }
}

const fn micro(what: &'static str, metric: &'static str, limit: f64) -> Target {
    let measure = Measure::MorePercent { base: "native" };
    Target {
        what,
        experiment: "overhead-micro",
        workload: "micro",
        parameters: "",
        arm: "pod-unconfined",
        metric,
        measure,
        limit,
    }
}

const fn drawing(what: &'static str, workload: &'static str) -> Target {
    Target {
        what,
        experiment: "overhead-desktop",
        workload,
        parameters: "",
        arm: "pod",
        metric: "x11perf",
        measure: Measure::LessPercent { base: "native" },
        limit: 3.0,
    }
}

/// Every number to reach.
pub const ALL: &[Target] = &[
    time("Apache (event): downtime, left running", "apache-event", "leave-running", "downtime", 30.0),
    time("Apache (event): checkpoint, left running, whole command", "apache-event", "leave-running", "whole", 80.0),
    time("Apache (event): checkpoint, stopped, whole command", "apache-event", "stop", "whole", 80.0),
    time(
        "Apache (event): restart until the first request is answered",
        "apache-event",
        "restart",
        "first_answer",
        80.0,
    ),
    time("sleep: downtime, left running", "sleep", "leave-running", "downtime", 5.0),
    time("sleep: checkpoint, left running, whole command", "sleep", "leave-running", "whole", 15.0),
    time("sleep: checkpoint, stopped, whole command", "sleep", "stop", "whole", 40.0),
    time("sleep: restart, whole command", "sleep", "restart", "whole", 20.0),
    time("desktop (classic): downtime, left running again", "desktop-classic", "repeat", "downtime", 20.0),
    time(
        "desktop (classic): checkpoint, left running, whole command",
        "desktop-classic",
        "leave-running",
        "whole",
        150.0,
    ),
    time("desktop (classic): checkpoint, stopped, whole command", "desktop-classic", "stop", "whole", 150.0),
    time(
        "desktop (classic): restart until the viewer sees a new frame",
        "desktop-classic",
        "restart",
        "first_answer",
        100.0,
    ),
    time("desktop (full): downtime, left running again", "desktop-full", "repeat", "downtime", 80.0),
    time("desktop (full): checkpoint, left running, whole command", "desktop-full", "leave-running", "whole", 500.0),
    time("desktop (full): checkpoint, stopped, whole command", "desktop-full", "stop", "whole", 500.0),
    time("desktop (full): restart until the viewer sees a new frame", "desktop-full", "restart", "first_answer", 350.0),
    drawing("desktop (classic): x11perf lost in a pod", "desktop-classic"),
    drawing("desktop (full): x11perf lost in a pod", "desktop-full"),
    Target {
        what: "Apache (event): requests a second lost in a pod",
        experiment: "overhead-apache",
        workload: "apache-event",
        parameters: "file=1k.bin",
        arm: "pod",
        metric: "requests_per_second",
        measure: Measure::LessPercent { base: "native" },
        limit: 3.0,
    },
    micro("getpid in a pod, no seccomp profile", "getpid", 1.0),
    micro("read of a byte in a pod, no seccomp profile", "read", 1.0),
    micro("fork+exit in a pod, no seccomp profile", "fork_exit", 3.0),
    Target {
        what: "the default seccomp profile, a call",
        experiment: "overhead-micro",
        workload: "micro",
        parameters: "",
        arm: "pod",
        metric: "getpid",
        measure: Measure::More { base: "pod-unconfined" },
        limit: 30.0,
    },
];
