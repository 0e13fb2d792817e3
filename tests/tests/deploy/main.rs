//! What `deploy/` brings: that it says what it should, that the tools it is made for take it, and that alerts fire for leaks and for
//! nothing else.

mod host_files;
mod image;
mod manifests;
mod prometheus;
mod rules;

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use leaktrace_tests::{deploy, host};

/// Makes a certificate and its key, `tls.crt` and `tls.key`, in this folder; `false` where nothing can.
fn certificate(test: &str, folder: &Path) -> Result<bool> {
    let Some(openssl) = host::program(test, "openssl") else { return Ok(false) };
    let made = Command::new(openssl)
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args([
            "-subj",
            "/CN=leaktrace",
            "-addext",
            "subjectAltName=DNS:leaktrace",
            "-keyout",
            "tls.key",
            "-out",
            "tls.crt",
        ])
        .current_dir(folder)
        .output()?;
    deploy::text(made, "make a certificate")?;
    Ok(true)
}
