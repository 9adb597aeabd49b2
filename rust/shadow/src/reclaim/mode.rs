//! The word in which a vCPU says that it reads shadow pages.

use tdpmmu_platform::Platform;

/// A vCPU's mode, as far as lockless walks change it (READING_SHADOW_PAGE_TABLES).
///
/// Whoever flushes remotely reads the same word: it waits until a walk that it found has ended, and sends no kick for it. The barrier that the walk needs between its announcement and its
/// first read is not the word's business ([`super`]).
pub trait ModeWord {
    /// A walk begins: stores READING with a number that no earlier walk or guest entry had. The vCPU is outside of the guest.
    fn begin_reading<P: Platform>(&self);
    /// The walk is over: stores OUTSIDE, as a release.
    fn end_reading<P: Platform>(&self);
}

impl<W: ModeWord + ?Sized> ModeWord for &W {
    #[inline(always)]
    fn begin_reading<P: Platform>(&self) {
        (**self).begin_reading::<P>();
    }

    #[inline(always)]
    fn end_reading<P: Platform>(&self) {
        (**self).end_reading::<P>();
    }
}

/// The mode word of a task that is no vCPU: there is none.
#[derive(Clone, Copy, Debug)]
pub enum NoMode {}

impl ModeWord for NoMode {
    fn begin_reading<P: Platform>(&self) {
        match *self {}
    }

    fn end_reading<P: Platform>(&self) {
        match *self {}
    }
}
