//! Certificates of a test's own, made with openssl: of two authorities, good or wrong in one way each.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use uuid::Uuid;

use super::support::said;

/// What a certificate says.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// Its common name.
    pub(crate) subject: &'a str,
    /// Extensions, as openssl writes them.
    pub(crate) extensions: &'a str,
    pub(crate) term: Term,
}

/// When it counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Term {
    Now,
    Ended,
    NotYet,
}

/// A server that is called localhost, and nothing else.
pub(crate) const SERVER: Wanted<'static> = Wanted {
    subject: "server",
    extensions: "subjectAltName = DNS:localhost\nextendedKeyUsage = serverAuth\n",
    term: Term::Now,
};

/// Who is called `settled`.
pub(crate) const CLIENT: Wanted<'static> = Wanted {
    subject: "settled",
    extensions: "extendedKeyUsage = clientAuth\n",
    term: Term::Now,
};

/// A directory with certificates of two authorities, `good` and `other`.
pub(crate) struct Certificates(PathBuf);

/// Runs it; the error is that there is none.
fn openssl(directory: &Path, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("openssl")
        .current_dir(directory)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("openssl: {error}"))?;
    assert!(output.status.success(), "openssl {arguments:?}: {}", said(&output));
    Ok(())
}

const NEW_KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

impl Certificates {
    /// With the authorities, `good-server.pem` and `.key`, and the same of `other`. Err says why that can not be done here.
    pub(crate) fn new() -> Result<Self, String> {
        let name = format!("certificates-{}", Uuid::new_v4().simple());
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&directory).expect("a directory");
        let certificates = Self(directory);
        let config = "[req]\ndistinguished_name = dn\nx509_extensions = ca\n[dn]\n[ca]\n\
                      basicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign\n\
                      [signing]\ndatabase = index.txt\nnew_certs_dir = .\npolicy = any\nunique_subject = no\n\
                      default_md = sha256\nrand_serial = yes\n[any]\ncommonName = supplied\n";
        std::fs::write(certificates.file("openssl.cnf"), config).expect("a file");
        std::fs::write(certificates.file("index.txt"), "").expect("a file");
        for authority in ["good", "other"] {
            let [subject, key, certificate] = [
                format!("/CN={authority}"),
                format!("{authority}.key"),
                format!("{authority}.pem"),
            ];
            let new = ["req", "-config", "openssl.cnf", "-subj", &subject];
            let out = ["-x509", "-days", "2", "-keyout", &key, "-out", &certificate];
            certificates.openssl(&[&new[..], &NEW_KEY, &out].concat())?;
            certificates.issue(authority, &format!("{authority}-server"), SERVER)?;
        }
        Ok(certificates)
    }

    /// NAME.pem and NAME.key, signed by an authority. What had the name before is replaced.
    pub(crate) fn issue(&self, authority: &str, name: &str, wanted: Wanted<'_>) -> Result<(), String> {
        let [key, request, certificate, extensions] = ["key", "csr", "pem", "ext"].map(|end| format!("{name}.{end}"));
        std::fs::write(self.file(&extensions), wanted.extensions).expect("a file");
        let subject = format!("/CN={}", wanted.subject);
        let new = ["req", "-config", "openssl.cnf", "-subj", &subject];
        let out = ["-new", "-keyout", &key, "-out", &request];
        self.openssl(&[&new[..], &NEW_KEY, &out].concat())?;
        let [signer, signer_key] = [format!("{authority}.pem"), format!("{authority}.key")];
        let (from, until) = match wanted.term {
            Term::Now => ("20200101000000Z", "20990101000000Z"),
            Term::Ended => ("20200101000000Z", "20200102000000Z"),
            Term::NotYet => ("20980101000000Z", "20990101000000Z"),
        };
        let sign = ["ca", "-batch", "-notext", "-config", "openssl.cnf"];
        let by = ["-name", "signing", "-cert", &signer, "-keyfile", &signer_key];
        let of = ["-in", &request, "-out", &certificate, "-extfile", &extensions];
        let when = ["-startdate", from, "-enddate", until];
        self.openssl(&[&sign[..], &by, &of, &when].concat())
    }

    fn openssl(&self, arguments: &[&str]) -> Result<(), String> {
        openssl(&self.0, arguments)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn name(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// Puts one in another's place, as whoever renews certificates does: all of it at once.
    pub(crate) fn replace(&self, name: &str, with: &str) {
        for end in ["pem", "key"] {
            let (new, old) = (format!("{with}.{end}"), format!("{name}.{end}"));
            swap(&self.file(&new), &self.file(&old));
        }
    }
}

/// A copy under another's name, there at once and whole.
pub(crate) fn swap(new: &Path, old: &Path) {
    let beside = old.with_extension("new");
    std::fs::copy(new, &beside).expect("a copy");
    std::fs::rename(&beside, old).expect("in its place");
}

impl Drop for Certificates {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Makes an authority, and a certificate of a server that is called localhost, and nothing else: NAME.pem, NAME-server.pem
/// and NAME-server.key.
pub(crate) fn certify(directory: &Path, name: &str) -> Result<(), String> {
    let config = "[req]\ndistinguished_name = dn\nx509_extensions = ca\n[dn]\n[ca]\n\
                  basicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign\n";
    std::fs::write(directory.join("openssl.cnf"), config).expect("a file");
    std::fs::write(directory.join("server.ext"), "subjectAltName = DNS:localhost\n").expect("a file");
    let [subject, key, certificate] = [format!("/CN={name}"), format!("{name}.key"), format!("{name}.pem")];
    let [server_key, request, server] = ["key", "csr", "pem"].map(|ending| format!("{name}-server.{ending}"));
    let new = ["req", "-config", "openssl.cnf", "-subj", &subject];
    let out = ["-x509", "-days", "2", "-keyout", &key, "-out", &certificate];
    openssl(directory, &[&new[..], &NEW_KEY, &out].concat())?;
    let out = ["-new", "-keyout", &server_key, "-out", &request];
    openssl(directory, &[&new[..], &NEW_KEY, &out].concat())?;
    let sign = [
        "x509",
        "-req",
        "-days",
        "2",
        "-in",
        &request,
        "-CA",
        &certificate,
        "-CAkey",
        &key,
    ];
    let out = ["-set_serial", "1", "-extfile", "server.ext", "-out", &server];
    openssl(directory, &[&sign[..], &out].concat())
}
