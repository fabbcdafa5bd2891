//! `dev/test` where cargo-nextest is not installed: what a filter of nextest's says is said to `cargo test` in its words.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use uuid::Uuid;

/// A folder with `dev/test`, and with stand-ins for what it calls: this cargo prints what it is told.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let name = format!("dev_test_{}", Uuid::new_v4().simple());
        let scratch = Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name));
        for folder in ["dev", "bin", "tests"] {
            std::fs::create_dir_all(scratch.0.join(folder)).expect("a folder");
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("dev/test");
        std::fs::copy(script, scratch.0.join("dev/test")).expect("a copy");
        for (name, does) in [
            ("dev/prerequisites", ":"),
            ("dev/services", ":"),
            ("bin/cargo", "printf '<%s>' \"$@\""),
        ] {
            let file = scratch.0.join(name);
            std::fs::write(&file, format!("#!/bin/sh\n{does}\n")).expect("a stand-in");
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        }
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[test]
fn a_filter_of_nextest_is_names_to_cargo_test() {
    let scratch = Scratch::new();
    let told = |arguments: &[&str]| {
        let output = Command::new(scratch.0.join("dev/test"))
            .args(arguments)
            .env("PATH", format!("{}:/usr/bin:/bin", scratch.0.join("bin").display()))
            .output()
            .expect("a shell");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let plain = "<test><--locked><--no-fail-fast><--features><faults><--lib><--bins><--tests><--examples>";
    for (arguments, more) in [
        (&[][..], ""),
        (&["hosts::"], "<hosts::>"),
        (&["-E", "test(store::) or test(hosts::)"], "<--><store::><hosts::>"),
        (
            &["-E", "test(a_b::)", "--", "--test-threads", "2"],
            "<--><--test-threads><2><a_b::>",
        ),
    ] {
        assert_eq!(told(arguments), (Some(0), format!("{plain}{more}")), "{arguments:?}");
    }
    assert_eq!(told(&["-E", "not test(store::)"]), (Some(2), String::new()));
}
