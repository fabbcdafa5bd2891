# shellcheck shell=bash
# For the scripts beside this folder: servers out of Debian 12's packages, unpacked into a temporary folder and run from
# there. Nothing is installed on the machine. Needs Debian 12 with apt-get and dpkg-deb; sourced by bash.
#
#   work=$(mktemp -d)          the script's own; it is deleted when the script ends
#   get_debs NAME[=VERSION]... download and unpack
#   start_broker               a RabbitMQ on loopback; sets amqp_port, broker_version
#   start_postgres             a PostgreSQL on a socket in $work; sets PGHOST, PGUSER, PGDATABASE
#   python_with NAME==VERSION...  a virtual environment with these from PyPI; python runs in it
#   node_with NAME@VERSION...     these from npm, in $work; run what stands in $work
#   rust_with DEPENDENCIES     builds the program on standard input with these lines of a Cargo.toml; run it as $work/rust/run;
#                              before start_broker, which changes HOME
set -euo pipefail

# None takes longer than this, whatever hangs.
[ -n "${FINDING_BOUNDED:-}" ] || FINDING_BOUNDED=1 exec timeout 900 bash "$(basename "$0")"

work=$(mktemp -d "${TMPDIR:-/tmp}/finding.XXXXXX")
chmod 755 "$work"
stop_all() {
    [ -z "${broker_pid:-}" ] || kill "$broker_pid" 2>/dev/null || true
    [ -z "${epmd_pid:-}" ] || kill "$epmd_pid" 2>/dev/null || true
    [ -z "${postgres_pid:-}" ] || kill -INT "$postgres_pid" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap stop_all EXIT

say() { printf '%s\n' "$*"; }
changed() { printf 'CHANGED: %s\n' "$*"; exit 1; }

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

python_with() {
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" -q install "$@"
}
python() { "$work/venv/bin/python" "$@"; }
node_with() { (cd "$work" && npm init -y >/dev/null && npm install --silent --no-audit --no-fund "$@" >/dev/null); }
rust_with() {
    mkdir -p "$work/rust/src"
    printf '[package]\nname = "finding"\nversion = "0.1.0"\nedition = "2021"\n[dependencies]\n%s\n' "$1" >"$work/rust/Cargo.toml"
    cat >"$work/rust/src/main.rs"
    (cd "$work/rust" && CARGO_TARGET_DIR="$work/rust/target" CARGO_PROFILE_DEV_DEBUG=0 cargo build -q)
    cp "$work/rust/target/debug/finding" "$work/rust/run"
}

get_debs() {
    mkdir -p "$work/debs" "$work/root"
    (cd "$work/debs" && apt-get download -qq "$@" 2>"$work/apt.log") || { cat "$work/apt.log" >&2; exit 2; }
    local deb
    for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
    LD_LIBRARY_PATH=$work/root/usr/lib/$(dpkg-architecture -q DEB_HOST_MULTIARCH 2>/dev/null || echo x86_64-linux-gnu):${LD_LIBRARY_PATH:-}
    export LD_LIBRARY_PATH
}

# The settings are those of a plain node; before it, plugins='rabbitmq_x, rabbitmq_y' and advanced='{application, [..]}' may be set.
start_broker() {
    get_debs rabbitmq-server=3.10.8-1.1+deb12u1 erlang-base erlang-asn1 erlang-crypto erlang-eldap erlang-inets \
        erlang-mnesia erlang-os-mon erlang-parsetools erlang-public-key erlang-runtime-tools erlang-snmp erlang-ssl \
        erlang-syntax-tools erlang-tools erlang-xmerl erlang-ftp erlang-tftp libsctp1
    amqp_port=$(free_port)
    export ERL_EPMD_PORT ERL_EPMD_ADDRESS=127.0.0.1 HOME="$work/home"
    ERL_EPMD_PORT=$(free_port)
    mkdir -p "$HOME"
    export PATH="$work/root/usr/lib/erlang/bin:$PATH"
    export RABBITMQ_NODENAME="finding-$$@localhost" RABBITMQ_MNESIA_BASE="$work/data" RABBITMQ_LOG_BASE="$work/log"
    export RABBITMQ_ENABLED_PLUGINS_FILE="$work/plugins" RABBITMQ_CONFIG_FILE="$work/rabbitmq.conf"
    export RABBITMQ_ADVANCED_CONFIG_FILE="$work/advanced.config" RABBITMQ_CONF_ENV_FILE=/dev/null
    RABBITMQ_DIST_PORT=$(free_port)
    export RABBITMQ_DIST_PORT RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
    printf '[%s].\n' "${plugins:-}" >"$RABBITMQ_ENABLED_PLUGINS_FILE"
    printf '[%s].\n' "${advanced:-}" >"$RABBITMQ_ADVANCED_CONFIG_FILE"
    printf 'listeners.tcp.1 = 127.0.0.1:%s\n' "$amqp_port" >"$RABBITMQ_CONFIG_FILE"
    epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 &
    epmd_pid=$!
    broker_sbin=$work/root/usr/lib/rabbitmq/lib/rabbitmq_server-3.10.8/sbin
    "$broker_sbin/rabbitmq-server" >"$work/broker.log" 2>&1 &
    broker_pid=$!
    for _ in $(seq 120); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$amqp_port") 2>/dev/null; then break; fi
        kill -0 "$broker_pid" 2>/dev/null || { cat "$work/broker.log" >&2; exit 2; }
        sleep 0.5
    done
    rabbitmqctl() { "$broker_sbin/rabbitmqctl" --node "$RABBITMQ_NODENAME" "$@"; }
    rabbitmqctl -q await_startup >/dev/null
    # shellcheck disable=SC2034
    broker_version=$(rabbitmqctl -q version)
    export SETTINGS_URL="amqp://guest:guest@127.0.0.1:$amqp_port/%2f"
}

# PostgreSQL refuses to run as root.
start_postgres() {
    get_debs postgresql-15 postgresql-client-15 libpq5 libllvm14
    local bin=$work/root/usr/lib/postgresql/15/bin as=()
    if [ "$(id -u)" -eq 0 ]; then as=(setpriv --reuid=65534 --regid=65534 --clear-groups); chown -R 65534:65534 "$work"; fi
    "${as[@]}" "$bin/initdb" -D "$work/cluster" -L "$work/root/usr/share/postgresql/15" -U finding -A trust -E UTF8 --locale=C >"$work/initdb.log"
    "${as[@]}" "$bin/postgres" -D "$work/cluster" -k "$work" -c listen_addresses= >"$work/postgres.log" 2>&1 &
    postgres_pid=$!
    export PGHOST=$work PGUSER=finding PGDATABASE=postgres
    for _ in $(seq 60); do
        if psql -qAtc 'SELECT 1' >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    cat "$work/postgres.log" >&2
    exit 2
}
psql() { "$work/root/usr/lib/postgresql/15/bin/psql" "$@"; }
