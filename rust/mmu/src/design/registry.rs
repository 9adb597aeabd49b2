//! Designs by name: those of this crate, and those that its users add.
//!
//! A design is known to a name and a platform: its builder makes designs of one platform. What is told about it is told once, so that
//! [`info`] needs no platform. Registrations last as long as the process, as the table of a kernel's own designs does.

use std::any::{Any, TypeId};
use std::sync::{Arc, PoisonError, RwLock};

use tdpmmu_platform::Platform;

use super::{
    AsyncWorker, AsyncWorkerOwned, DESIGNS, DefunctFlag, DesignInfo, DesignOptions, InPlace, Inline,
    NoSecondPhase, SecondList, SecondListWorker, Sync, SystemWorkqueue, ZapDesign,
};

/// Makes a design.
type Builder<P> = fn(&DesignOptions) -> Arc<dyn ZapDesign<P>>;

struct Registration {
    info: &'static DesignInfo,
    platform: TypeId,
    builder: Box<dyn Any + Send + std::marker::Sync>,
}

static REGISTERED: RwLock<Vec<Registration>> = RwLock::new(Vec::new());

/// A design could not be registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The name is taken, on this platform or by the crate itself.
    #[error("a zap design named {0:?} exists already")]
    Duplicate(&'static str),
    /// The same name on another platform was described differently.
    #[error("the zap design {0:?} was registered for another platform with another description")]
    Differs(&'static str),
}

/// No design has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown zap design {0:?}; known: {known}", known = names().join(", "))]
pub struct UnknownDesign(pub String);

/// Makes a design of one's own known by `info.name`, so that [`build`], [`info`] and all that take a design's name find it.
///
/// # Errors
/// [`RegisterError`] when the name is taken.
pub fn register<P: Platform>(info: DesignInfo, builder: Builder<P>) -> Result<(), RegisterError> {
    let mut all = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    let platform = TypeId::of::<P>();
    let mut same = all.iter().filter(|r| r.info.name == info.name);
    if DESIGNS.iter().any(|d| d.name == info.name) || same.any(|r| r.platform == platform) {
        return Err(RegisterError::Duplicate(info.name));
    }
    let known = all.iter().find(|r| r.info.name == info.name).map(|r| r.info);
    if known.is_some_and(|known| *known != info) {
        return Err(RegisterError::Differs(info.name));
    }
    let info = known.unwrap_or_else(|| Box::leak(Box::new(info)));
    all.push(Registration { info, platform, builder: Box::new(builder) });
    Ok(())
}

/// Looks a design up by name.
pub fn info(name: &str) -> Option<&'static DesignInfo> {
    let own = || {
        let all = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|r| r.info).find(|d| d.name == name)
    };
    DESIGNS.iter().find(|d| d.name == name).or_else(own)
}

/// The name of every design: the crate's own in order, then those that were registered.
pub fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = DESIGNS.iter().map(|d| d.name).collect();
    for registration in REGISTERED.read().unwrap_or_else(PoisonError::into_inner).iter() {
        if !names.contains(&registration.info.name) {
            names.push(registration.info.name);
        }
    }
    names
}

/// Builds a design by name.
///
/// # Errors
/// The name, when there is no such design on platform `P`.
pub fn build<P: Platform>(
    name: &str,
    options: &DesignOptions,
) -> Result<Arc<dyn ZapDesign<P>>, UnknownDesign> {
    Ok(match name {
        "in-place" => Arc::new(InPlace),
        "inline" => Arc::new(Inline),
        "defunct-flag" => Arc::<DefunctFlag>::default(),
        "system-workqueue" => Arc::new(SystemWorkqueue::new(options)),
        "no-second-phase" => Arc::new(NoSecondPhase::new(options)),
        "second-list" => Arc::<SecondList>::default(),
        "second-list-worker" => Arc::new(SecondListWorker::new(options)),
        "async-worker" => Arc::new(AsyncWorker::new(options)),
        "async-worker-owned" => Arc::new(AsyncWorkerOwned::new(options)),
        "sync" => Arc::new(Sync),
        _ => {
            let builder = {
                let all = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
                let found = all.iter().find(|r| r.info.name == name && r.platform == TypeId::of::<P>());
                found.and_then(|r| r.builder.downcast_ref::<Builder<P>>()).copied()
            };
            // Not under the lock: who builds may need another design, or wait.
            builder.ok_or_else(|| UnknownDesign(name.to_owned()))?(options)
        }
    })
}
