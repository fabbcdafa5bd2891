//! `settled api` and the tools that others have: schemathesis against the document, and BitGo's own library as the signer. They
//! are installed once, pinned, beside the other tools of CI.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::{Value, json};
use tokio::process::Command;

use super::api_reads::{ROOT, add_client, token};
use crate::kit::{
    api::Api,
    auditor::Expect,
    partner::Partner,
    support::{PATIENCE, Place, said, skip},
};

/// Of PyPI.
const SCHEMATHESIS: &str = "4.32.5";
/// Of npm: what the SDK signs with.
const SIGNER: &str = "1.11.0";

/// Where CI keeps its tools.
pub(super) fn tools() -> PathBuf {
    let of = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    of("CI_TOOLS").unwrap_or_else(|| {
        let cache = of("XDG_CACHE_HOME").or_else(|| Some(of("HOME")?.join(".cache")));
        cache.unwrap_or_else(std::env::temp_dir).join("settled")
    })
}

/// Runs a program; what it said where it did not succeed.
pub(super) async fn run(program: &Path, arguments: &[&str], directory: &Path) -> Result<String, String> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE * 5, command.output())
        .await
        .map_err(|_| format!("{} {arguments:?} did not end", program.display()))?
        .map_err(|error| format!("{}: {error}", program.display()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(said(&output)),
    }
}

/// Makes a tool ready once: in a directory of its own, which gets its name when all of it is there.
async fn tool(name: &str, make: impl AsyncFn(&Path) -> Result<(), String>) -> Result<PathBuf, String> {
    let place = tools().join(name);
    let done = place.join("done");
    if done.exists() {
        return Ok(place);
    }
    std::fs::create_dir_all(&place).map_err(|error| format!("{}: {error}", place.display()))?;
    make(&place).await?;
    std::fs::write(&done, "").map_err(|error| format!("{}: {error}", done.display()))?;
    Ok(place)
}

async fn schemathesis() -> Result<PathBuf, String> {
    let name = format!("schemathesis-{SCHEMATHESIS}");
    let made = tool(&name, async |place| {
        run(Path::new("python3"), &["-m", "venv", "."], place).await?;
        let pinned = format!("schemathesis=={SCHEMATHESIS}");
        let install = ["install", "--quiet", "--disable-pip-version-check", &pinned];
        run(&place.join("bin/pip"), &install, place).await.map(drop)
    });
    Ok(made.await?.join("bin/schemathesis"))
}

async fn signer() -> Result<PathBuf, String> {
    tool(&format!("bitgo-secp256k1-{SIGNER}"), async |place| {
        let pinned = format!("@bitgo/secp256k1@{SIGNER}");
        let install = [
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
            ".",
            &pinned,
        ];
        run(Path::new("npm"), &install, place).await.map(drop)
    })
    .await
}

/// What the document says is so, for requests of every kind, right and wrong; in bounded time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schemathesis_finds_the_document_true() {
    let schemathesis = match schemathesis().await {
        Ok(schemathesis) => schemathesis,
        Err(why) => return skip("api_tools::schemathesis_finds_the_document_true", &why),
    };
    let place = Place::new("api_schemathesis").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<_> = (0..5).map(|_| partner.allocation("BTC", "10")).collect();
    place.reserve(&reservations).await;
    // One enterprise that is a partner and has clients, so that one path is right for both roles.
    add_client(&place, partner.client, "acme").await;
    let worker = place.ready_worker(&[]).await;
    place
        .publish(&[partner
            .draft(&reservations[0], "cleared")
            .set("nonce", "n-1")
            .message(Expect::Settles)])
        .await;
    place.rest().await;
    let settings = [("SETTLED_API__WAIT", "1s"), ("SETTLED_API__RATE_PER_TOKEN", "1000000")];
    let api = Api::start(&place, &settings).await;
    let id = reservations[0].id;
    for (role, paths, allocation) in [
        ("partner", "/partners/|/receipts|/openapi.json", id),
        ("client", "/clients/", id),
    ] {
        let bearer = token(&place, "acme", role, &[]).await;
        // What is in a path is mostly right, or nothing but 403 and 404 would be seen.
        let config = format!(
            "[parameters]\n\"path.enterpriseId\" = \"acme\"\n\"path.allocationId\" = \"{allocation}\"\n\"path.nonce\" = \"n-1\"\n"
        );
        let file = place.file(&format!("schemathesis-{role}.toml"));
        std::fs::write(&file, config).expect("a file");
        let url = format!("http://{}/openapi.json", api.address());
        let arguments = [
            "--config-file",
            file.to_str().expect("a path"),
            "run",
            &url,
            "--header",
            &format!("Authorization: Bearer {bearer}"),
            "--include-path-regex",
            paths,
            // Updates that fit the document are still refused: nobody signed them.
            "--exclude-checks",
            "positive_data_acceptance,ignored_auth",
            "--max-examples",
            "25",
            "--seed",
            "1",
            "--request-timeout",
            "20",
            "--generation-database",
            "none",
            "--no-color",
        ];
        let directory = place.file("");
        if let Err(why) = run(&schemathesis, &arguments, &directory).await {
            panic!("schemathesis as {role}: {why}");
        }
    }
    place.rest().await;
    // Nothing of it moved anything.
    let show = place
        .json(&["allocation", "show", &reservations[1].id.to_string()])
        .await;
    assert_eq!(show["allocation"]["status"], "reserved");
    worker.terminate().await;
}

/// A partner whose client is what BitGo publishes: signed by its library, sent by HTTP, settled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_bitgos_library_signs_settles() {
    let signer = match signer().await {
        Ok(signer) => signer,
        Err(why) => return skip("api_tools::what_bitgos_library_signs_settles", &why),
    };
    let place = Place::new("api_bitgo").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    let reservations: Vec<_> = (0..3).map(|_| partner.allocation("BTC", "10")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[]).await;
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tools/sign.js");
    for (reservation, (status, note)) in
        reservations
            .iter()
            .zip([("cleared", "n"), ("released", "\u{e4}\u{20ac}"), ("cleared", "'\"")])
    {
        let draft = partner.draft(reservation, status);
        let nonce = format!("{}-{note}", draft.fields.get("nonce").as_str().unwrap_or_default());
        let draft = draft.set("nonce", nonce);
        let payload = draft.fields.text();
        let output = Command::new("node")
            .arg(&script)
            .env("NODE_PATH", signer.join("node_modules"))
            .env("PARTNER_KEY", hex::encode(partner.key.to_secret_bytes()))
            .env("PAYLOAD", &payload)
            .output()
            .await
            .expect("node runs where npm did");
        assert!(output.status.success(), "{}", said(&output));
        let signature = String::from_utf8(output.stdout).expect("hexadecimal");
        let message = draft.message_signed(&payload, &signature, Expect::Settles);
        place.story().sent.push(crate::kit::auditor::Sent {
            routing_key: message.routing_key.clone(),
            body: message.body.clone(),
            expect: message.expect,
        });
        let path = format!("{ROOT}/acme/partners/allocations");
        let answer = api.ask("PUT", &path, &acme, &message.body).await;
        assert_eq!(answer.ok()["allocation"]["status"], json!(status));
        assert_ne!(answer.body["allocation"]["partnerExternalId"], Value::Null);
    }
    api.stop().await;
    place.settle_up(worker).await;
}
