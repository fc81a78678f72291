//! The stores of placement maps as they really are: one suite for both, what etcd does when it is cut off, full,
//! restarted or compacted, and a switch from one store to the other while a placement serves.

mod switch;
mod trouble;

use std::path::PathBuf;

use berth_crds::ExpertPlacement;
use berth_runtime::Clock;
use berth_scheduler::store::{
    ApiStore, Credentials, DEFAULT_PREFIX, Etcd, EtcdConfig, EtcdStore, Identity, Pair, Store, StoreError, Tls,
    conformance::{Subject, conform},
};
use berth_tests::{
    EtcdServer,
    control_plane::{ControlPlane, ControlPlaneConfig},
    etcd::EtcdOptions,
};
use berth_types::{Epoch, Revision};
use etcd_client::{Certificate, Client, ConnectOptions, PermissionType, TlsOptions};
use kube::{Api, api::PostParams};

use crate::{crd_rules, scheduler::placement};

/// How a server without certificates is reached.
fn config(server: &EtcdServer) -> EtcdConfig {
    EtcdConfig { endpoints: vec![server.url()], prefix: DEFAULT_PREFIX.to_owned(), tls: None, credentials: None }
}

/// The store of a leader.
fn leader(server: &EtcdServer, epoch: u64) -> EtcdStore {
    Etcd::new(config(server), Clock::real()).of_term(Epoch(epoch), &format!("pod-{epoch}@127.0.0.1:7400"))
}

fn subject() -> Subject {
    Subject { name: "default/p".parse().unwrap(), uid: "uid-1".to_owned() }
}

async fn create(store: &EtcdStore, revision: u64) -> Result<(), StoreError> {
    let subject = subject();
    store.create(&subject.uid, &subject.map(1, revision).unwrap()).await
}

async fn revisions(store: &dyn Store) -> Vec<u64> {
    let mut all: Vec<u64> = store.list().await.unwrap().into_iter().map(|(_, map)| map.spec.revision).collect();
    all.sort_unstable();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn both_stores_and_every_pair_of_them_pass_one_suite() {
    let (plane, server) = tokio::join!(
        ControlPlane::start(ControlPlaneConfig::named("store")),
        EtcdServer::start(EtcdOptions::default())
    );
    let (plane, server) = (plane.unwrap(), server.unwrap());
    let client = plane.client().unwrap();
    crd_rules::install(&client).await;
    // The garbage collector wants a real owner.
    let api: Api<ExpertPlacement> = Api::namespaced(client.clone(), "default");
    let owner = api.create(&PostParams::default(), &placement("p")).await.unwrap();
    let subject = Subject { uid: owner.metadata.uid.unwrap(), ..subject() };
    let api = || ApiStore::new(client.clone(), Clock::real());
    conform(&api(), &subject).await.unwrap();
    conform(&leader(&server, 1), &subject).await.unwrap();
    conform(&Pair::new(leader(&server, 2), api()), &subject).await.unwrap();
    conform(&Pair::new(api(), leader(&server, 3)), &subject).await.unwrap();
    let (at_api, in_etcd) = (revisions(&api()).await, revisions(&leader(&server, 4)).await);
    assert!(at_api.is_empty() && in_etcd.is_empty(), "the suite leaves nothing: {at_api:?}, {in_etcd:?}");

    // What the API server cannot take, etcd takes in parts.
    let large = subject.sized_map(4, 1, 120, 9_000).unwrap();
    let refused = api().create(&subject.uid, &large).await.unwrap_err();
    assert!(
        matches!(refused, StoreError::TooLarge { .. }) && refused.to_string().contains("keep maps in etcd"),
        "{refused}"
    );
    let etcd = leader(&server, 5);
    etcd.create(&subject.uid, &large).await.unwrap();
    let listed = etcd.list().await.unwrap();
    assert!(listed.len() == 1 && listed[0].0 == subject.uid && listed[0].1.spec == large.spec);
    etcd.forget(&subject.name, &subject.uid).await.unwrap();
    let mut raw = Client::connect([server.url()], None).await.unwrap();
    let left = raw.get("", Some(etcd_client::GetOptions::new().with_all_keys().with_keys_only())).await.unwrap();
    let left: Vec<&str> = left.kvs().iter().map(|pair| pair.key_str().unwrap()).collect();
    assert_eq!(left, ["/berth/leader"], "no head and no part is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_leader_writes_nothing_to_etcd() {
    let server = EtcdServer::start(EtcdOptions::default()).await.unwrap();
    let (old, new) = (leader(&server, 3), leader(&server, 4));
    create(&old, 1).await.unwrap();
    assert_eq!(revisions(&new).await, [1], "who lists leads");
    let subject = subject();
    let large = subject.sized_map(3, 2, 61, 9_000).unwrap();
    for outcome in [
        create(&old, 2).await,
        old.create(&subject.uid, &large).await,
        old.delete(&subject.name, &subject.uid, Revision(1)).await,
        old.forget(&subject.name, &subject.uid).await,
        // It would claim the key anew.
        create(&leader(&server, 3), 2).await,
    ] {
        let refused = outcome.unwrap_err();
        assert!(
            matches!(&refused, StoreError::Deposed { epoch: Epoch(3), leader, .. } if leader.ends_with("pod-4@127.0.0.1:7400")),
            "{refused}"
        );
    }
    assert_eq!(revisions(&new).await, [1]);
    let twin = Etcd::new(config(&server), Clock::real()).of_term(Epoch(4), "another@127.0.0.1:7400");
    assert!(matches!(create(&twin, 2).await, Err(StoreError::Deposed { .. })), "an epoch has one holder");
    create(&new, 2).await.unwrap();
    assert_eq!(Etcd::new(config(&server), Clock::real()).floor().await.unwrap(), Epoch(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_reached_with_certificates_and_credentials_from_files_that_may_change() {
    let mut server = EtcdServer::start(EtcdOptions { tls: true, ..EtcdOptions::default() }).await.unwrap();
    let read = |name: &str| std::fs::read(server.file(name)).unwrap();
    let own = etcd_client::Identity::from_pem(read("client.crt"), read("client.key"));
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca.crt"))).identity(own);
    let mut admin = Client::connect([server.url()], Some(ConnectOptions::new().with_tls(tls))).await.unwrap();
    admin.role_add("berth").await.unwrap();
    let permission = etcd_client::Permission::new(PermissionType::Readwrite, "/berth/").with_prefix();
    admin.role_grant_permission("berth", permission).await.unwrap();
    for (user, password, role) in [("root", "r00t", "root"), ("berth", "s3cret", "berth")] {
        if role == "root" {
            admin.role_add(role).await.unwrap();
        }
        admin.user_add(user, password, None).await.unwrap();
        admin.user_grant_role(user, role).await.unwrap();
    }
    admin.auth_enable().await.unwrap();

    let credentials = Credentials { user: server.file("user"), password: server.file("password") };
    let identity = |name: &str| {
        Some(Identity { cert: server.file(&format!("{name}.crt")), key: server.file(&format!("{name}.key")) })
    };
    let with = |identity: Option<Identity>, prefix: &str| EtcdConfig {
        prefix: prefix.to_owned(),
        tls: Some(Tls { ca: server.file("ca.crt"), identity }),
        credentials: Some(credentials.clone()),
        ..config(&server)
    };
    let store = |config| Etcd::new(config, Clock::real()).of_term(Epoch(1), "pod@127.0.0.1:7400");
    let write = |name: &str, text: &str| std::fs::write(server.file(name), text).unwrap();

    let berth = store(with(identity("client"), "/berth"));
    let missing = create(&berth, 1).await.unwrap_err();
    assert!(matches!(&missing, StoreError::File { file, .. } if *file == server.file("user")), "{missing}");
    write("user", "berth\n");
    write("password", "wrong\n");
    let refused = create(&berth, 1).await.unwrap_err();
    assert!(matches!(refused, StoreError::Refused { .. }), "{refused}");
    write("password", "s3cret\n");
    create(&berth, 1).await.unwrap();
    conform(&berth, &Subject { uid: "uid-2".to_owned(), ..subject() }).await.unwrap();

    let stranger = create(&store(with(None, "/berth")), 2).await.unwrap_err();
    assert!(matches!(stranger, StoreError::Unavailable { .. } | StoreError::Elapsed { .. }), "{stranger}");
    let elsewhere = create(&store(with(identity("client"), "/other")), 2).await.unwrap_err();
    assert!(matches!(elsewhere, StoreError::Refused { .. }), "{elsewhere}");

    // A restart forgets all logins; then the password changes, and its file.
    let (path, password): (PathBuf, _) = (server.file("password"), "n3w");
    server.kill();
    server.launch().await.unwrap();
    create(&berth, 2).await.unwrap();
    let root = ConnectOptions::new().with_tls(admin_tls(&server)).with_user("root", "r00t");
    let mut admin = Client::connect([server.url()], Some(root)).await.unwrap();
    admin.user_change_password("berth", password).await.unwrap();
    std::fs::write(path, password).unwrap();
    create(&berth, 3).await.unwrap();
    assert_eq!(revisions(&berth).await, [1, 2, 3]);
}

fn admin_tls(server: &EtcdServer) -> TlsOptions {
    let read = |name: &str| std::fs::read(server.file(name)).unwrap();
    let own = etcd_client::Identity::from_pem(read("client.crt"), read("client.key"));
    TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca.crt"))).identity(own)
}
