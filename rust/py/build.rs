//! Stamps the build into the module, so that every result can say what was measured.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=TDPMMU_GIT");
    println!("cargo:rerun-if-changed=build.rs");
    let git = std::env::var("TDPMMU_GIT").ok().or_else(git_describe).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=TDPMMU_GIT={git}");
    let profile = std::env::var("PROFILE").unwrap_or_default();
    println!("cargo:rustc-env=TDPMMU_PROFILE={profile}");
    let target = std::env::var("TARGET").unwrap_or_default();
    println!("cargo:rustc-env=TDPMMU_TARGET={target}");
}

/// `None` outside a checkout (an sdist) and where git is not installed.
fn git_describe() -> Option<String> {
    for path in ["HEAD", "index"] {
        let out = Command::new("git").args(["rev-parse", "--git-path", path]).output().ok()?;
        let file = String::from_utf8(out.stdout).ok()?;
        println!("cargo:rerun-if-changed={}", file.trim());
    }
    let out = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output().ok()?;
    if !out.status.success() {
        return None;
    }
    Some(String::from_utf8(out.stdout).ok()?.trim().to_owned())
}
