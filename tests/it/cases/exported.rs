//! What leaves encrypted, read with the private key and with nothing else.

use std::{io::Read, process::Output};

use age::{Decryptor, Identity, secrecy::ExposeSecret, x25519};

use crate::kit::{
    amqp::Message,
    auditor::Expect,
    command::Answer,
    support::{COLLECTS, PATIENCE, Place, count, said, until},
};

async fn export(place: &Place, recipients: &[&str]) -> Output {
    let mut arguments = vec!["dead-letters", "export", "--operator", "ann"];
    for recipient in recipients {
        arguments.extend(["--recipient", recipient]);
    }
    place.command(&arguments).output().await.expect("settled runs")
}

pub(super) fn decrypted(bytes: &[u8], identity: &x25519::Identity) -> Result<String, age::DecryptError> {
    let mut reader = Decryptor::new(bytes)?.decrypt(std::iter::once(identity as &dyn Identity))?;
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("whole, and text");
    Ok(text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_exported_is_read_with_the_private_key_alone() {
    let place = Place::new("sealed").await;
    let [mine, theirs, nobodys] = std::array::from_fn(|_| x25519::Identity::generate());
    let keys = [&mine, &theirs].map(|identity| identity.to_public().to_string());
    let keys = [keys[0].as_str(), keys[1].as_str()];
    // Of nothing it is a file too.
    let empty = export(&place, &keys[..1]).await;
    assert!(empty.status.success(), "{}", said(&empty));
    assert_eq!(decrypted(&empty.stdout, &mine).expect("mine"), "");

    let worker = place.ready_worker(&COLLECTS).await;
    let body = "{\"a body that nobody else reads\": 1}";
    let messages: Vec<_> = (0..3)
        .map(|number| Message::new("acme.allocation.update", format!("{body}{number}"), Expect::Any))
        .collect();
    place.publish(&messages).await;
    let db = place.db().await;
    until("they are kept", PATIENCE, async || {
        (count(&db, "dead_letters").await == 3).then_some(())
    })
    .await;
    worker.terminate().await;
    let plain = export(&place, &[]).await;
    let plain = String::from_utf8(plain.stdout).expect("text");
    assert_eq!(plain.lines().count(), 3);
    let sealed = export(&place, &keys).await;
    assert!(sealed.status.success() && sealed.stderr.is_empty(), "{}", said(&sealed));
    assert!(sealed.stdout.starts_with(b"age-encryption.org/v1\n"));
    for identity in [&mine, &theirs] {
        assert_eq!(decrypted(&sealed.stdout, identity).expect("theirs to read"), plain);
    }
    assert!(decrypted(&sealed.stdout, &nobodys).is_err());
    // What is cut off is not taken for the whole.
    let cut = sealed.stdout.split_last().expect("bytes").1;
    let mut reader = Decryptor::new(cut)
        .expect("its head")
        .decrypt(std::iter::once(&mine as &dyn Identity))
        .expect("mine");
    assert!(reader.read_to_end(&mut Vec::new()).is_err());

    let sql = "SELECT outcome FROM settled.audit WHERE act = 'export' ORDER BY id DESC LIMIT 1";
    let outcome: String = db
        .query_one(&sql.replace("outcome FROM", "outcome::text FROM"), &[])
        .await
        .expect("the audit")
        .get(0);
    let outcome: serde_json::Value = serde_json::from_str(&outcome).expect("JSON");
    assert_eq!(outcome["recipients"], serde_json::json!(keys));

    // What is no public key is refused before anything is written down, and a private one is not repeated.
    let before = count(&db, "audit").await;
    let secret = mine.to_string();
    for (key, piece) in [
        (secret.expose_secret(), "is a private key"),
        ("age1nonsense", "no public key of age"),
        ("ssh-ed25519 AAAA", "no public key of age"),
        ("", "no public key of age"),
    ] {
        let answer = Answer::of(&export(&place, &[keys[0], key]).await);
        assert_eq!(answer.code, Some(2), "{}", answer.all());
        assert!(answer.out.is_empty() && answer.err.contains(piece), "{}", answer.all());
        assert!(!answer.err.contains("AGE-SECRET-KEY-1"), "{}", answer.all());
    }
    assert_eq!(count(&db, "audit").await, before);
}
