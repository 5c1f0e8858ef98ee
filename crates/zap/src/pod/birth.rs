//! How a pod comes into being.

use std::io;
use std::time::SystemTime;

use crate::fault;
use crate::ids::HostPid;
use crate::mounts;
use crate::pod::control::Control;
use crate::pod::host_config::HostConfig;
use crate::pod::init::Setup;
use crate::pod::journal::Journal;
use crate::pod::limits::{LimitError, LimitGroups};
use crate::pod::live::{Birth, LivePod};
use crate::pod::namespaces::Shim;
use crate::pod::network::former::FormerPlace;
use crate::pod::network::trail::Trail;
use crate::pod::network::{self, Network};
use crate::pod::registry::{PodState, ProcessId, Record};
use crate::pod::sysctls::Sysctls;
use crate::pod::{Cgroup, NetworkMode, PodError, PodSpec, Store, devices, rootfs};
use crate::process::handles::Handles;
use crate::processor::Beginnings;
use crate::sys::channel;
use crate::sys::pidfd::PidFd;

/// Makes a pod without a command. On failure nothing is left of it.
pub(super) fn create(store: Store, mut spec: PodSpec, birth: Birth<'_>) -> Result<LivePod, PodError> {
    let claim = store.claim_new(&spec.name)?;
    let mut scaffold = Scaffold {
        store: store.clone(),
        name: spec.name.clone(),
        cgroup: None,
        limits: None,
        network: None,
        shim: birth.shim,
        standing: false,
    };
    let failed = |step: &str| {
        let (pod, step) = (spec.name.clone(), step.to_owned());
        move |source: io::Error| PodError::Kernel { pod, step, source }
    };
    let passed = |point: &str| fault::fallible(point).map_err(failed(fault::OBJECT));
    passed("birth-claimed")?;
    let listener = Some(store.listen(&spec.name)?);
    let mut cgroup = Cgroup::of(&store, &spec)?;
    scaffold.cgroup = Some(cgroup.clone());
    let created = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    store.save(&unborn(&spec, &cgroup, &created))?;
    passed("birth-recorded")?;
    cgroup.make()?;
    devices::confine(&cgroup, &spec.binds)?;
    passed("birth-grouped")?;
    let sysctls = Sysctls::watch(&cgroup);
    let fresh = birth.unpack.is_none();
    let mut plan = rootfs::plan(&store, &spec, fresh)?;
    plan.last_pid = birth.last_pid;
    rootfs::prepare_layers(&store.storage_dir(&spec.name), &plan.overlays)?;
    let wishes = Wishes {
        address: birth.address,
        mac: birth.mac,
        blocked: birth.network_blocked,
        former: birth.former,
        trail: birth.trail,
    };
    if let Some(unpack) = birth.unpack {
        unpack(&rootfs::upper_dir(&store, &spec.name))?;
    }
    passed("birth-layered")?;

    let (control, monitor_end) = channel::message_pair().map_err(failed("making a socket"))?;
    let setup = Setup { control: &control, monitor_end: &monitor_end, plan: &plan, hostname: &spec.hostname };
    let own_network = spec.network != NetworkMode::Host;
    let (directory, doors) = (cgroup.open()?, cgroup.doors()?);
    let fresh;
    let shim = match birth.shim {
        Some(shim) => shim,
        None => {
            fresh = Shim::fork().map_err(failed("forking"))?;
            &fresh
        }
    };
    let init = shim
        .start_init(&setup, birth.clocks.unwrap_or_default(), own_network, &directory, &doors)
        .map_err(|(step, source)| failed(step)(source))?;
    drop(control);
    passed("birth-cloned")?;
    let limits = LimitGroups::create(&cgroup, &spec.limits).map_err(|e| limit_error(&spec.name, e))?;
    scaffold.limits = Some(limits.clone());
    let note = |network: &Network| {
        let limits = limits.clone();
        store.save(&Record { network: serde_json::to_value(network).ok(), limits, ..unborn(&spec, &cgroup, &created) })
    };
    scaffold.network = connect(&store, &spec, &wishes, init, &note)?;
    passed("birth-connected")?;
    let process = PidFd::open(init).map_err(failed("opening PID 1"))?;
    Control::await_ready(&spec.name, &monitor_end, &process)?;
    let control = Control::listen(&spec.name, monitor_end, process)?;
    let noted = mounts::note_birth(&spec, init, &store.mounts_file(&spec.name));
    noted.map_err(failed("writing its mounts down"))?;
    passed("birth-ready")?;

    let network = scaffold.finish();
    if let (None, Some(network)) = (&spec.address, &network) {
        spec.address = Some(network.inner().clone());
    }
    let journal = Journal::at(store.pod_dir(&spec.name).join("journal"));
    let pod = LivePod {
        spec,
        store,
        init,
        cgroup,
        main: None,
        network,
        departing: None,
        journal,
        limits,
        control,
        session: None,
        hush: None,
        created,
        state: PodState::Running,
        handles: Handles::default(),
        layouts: Default::default(),
        in_doubt: false,
        residual: None,
        beginnings: Beginnings::default(),
        sysctls,
        listener,
        _claim: claim,
    };
    let saved = pod.save().and_then(|()| {
        let pod = pod.spec.name.clone();
        fault::fallible("birth-saved").map_err(|source| PodError::Kernel { pod, step: fault::OBJECT.into(), source })
    });
    match saved {
        Ok(()) => Ok(pod),
        Err(error) => {
            pod.abandon();
            Err(error)
        }
    }
}

/// What the registry knows of a pod that is being made: enough to tidy up if that is cut off.
fn unborn(spec: &PodSpec, cgroup: &Cgroup, created: &str) -> Record {
    Record {
        spec: spec.clone(),
        state: PodState::Running,
        init: None,
        monitor: ProcessId::of(HostPid(std::process::id() as i32)),
        main: None,
        exit_code: None,
        created: created.to_owned(),
        cgroup: cgroup.clone(),
        network: None,
        limits: LimitGroups::default(),
        in_doubt: false,
        residual: None,
        beginnings: Beginnings::default(),
    }
}

struct Wishes<'a> {
    address: Option<(std::net::Ipv4Addr, Option<u8>)>,
    mac: Option<[u8; 6]>,
    blocked: bool,
    former: Option<&'a FormerPlace>,
    trail: Option<&'a Trail>,
}

fn connect(
    store: &Store,
    spec: &PodSpec,
    wishes: &Wishes<'_>,
    init: HostPid,
    note: &dyn Fn(&Network) -> Result<(), PodError>,
) -> Result<Option<Network>, PodError> {
    let network = |source| PodError::Network { pod: spec.name.clone(), source };
    match spec.network {
        NetworkMode::Host => Ok(None),
        NetworkMode::Private => network::loopback(init).map(|()| None).map_err(network),
        NetworkMode::Bridge => {
            let config = HostConfig::load(store.state())
                .map_err(|e| PodError::Request { pod: spec.name.clone(), what: e.to_string() })?;
            let request = network::Request {
                pod: &spec.name,
                inner: spec.address.as_ref(),
                address: wishes.address,
                mac: wishes.mac,
                publish: &spec.publish,
                blocked: wishes.blocked,
                former: wishes.former,
                trail: wishes.trail,
            };
            let note = |network: &Network| note(network).map_err(io::Error::other);
            Network::attach(&config, &request, init, &note).map(Some).map_err(network)
        }
    }
}

fn limit_error(pod: &str, error: LimitError) -> PodError {
    match error {
        LimitError::Lacks(what) => PodError::Lacks(format!("a control group that could limit {what}")),
        other => PodError::Request { pod: pod.to_owned(), what: other.to_string() },
    }
}

/// Takes down what stands of a pod when its making fails half-way.
struct Scaffold<'a> {
    store: Store,
    name: String,
    cgroup: Option<Cgroup>,
    limits: Option<LimitGroups>,
    network: Option<Network>,
    /// A child that waits to be told to make the pod, or to end.
    shim: Option<&'a Shim>,
    standing: bool,
}

impl Scaffold<'_> {
    /// The pod stands by itself.
    fn finish(mut self) -> Option<Network> {
        let network = self.network.take();
        self.standing = true;
        network
    }
}

impl Drop for Scaffold<'_> {
    fn drop(&mut self) {
        if self.standing {
            return;
        }
        // The error that brought us here is the one to tell; these are the last of what can be done.
        if let Some(shim) = self.shim {
            shim.dismiss();
        }
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.kill();
            while let Ok(nix::sys::wait::WaitStatus::Exited(..) | nix::sys::wait::WaitStatus::Signaled(..)) =
                nix::sys::wait::wait()
            {}
        }
        if let Some(network) = &self.network {
            let _ = network.detach();
        }
        if let Some(limits) = &self.limits {
            limits.remove();
        }
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.remove();
        }
        let _ = self.store.forget(&self.name);
    }
}
