# shellcheck shell=bash
# For the scripts beside this folder, after debian.sh: a newer RabbitMQ out of Debian 13's packages (trixie), unpacked into a
# temporary folder and run in a chroot there. Needs root; what it mounts is seen by its own processes only.
#
#   start_later_broker         on loopback; sets later_port, later_version

# shellcheck disable=SC2154
later_root=$work/later
start_later_broker() {
    [ "$(id -u)" -eq 0 ] || { say "a chroot needs root"; exit 2; }
    local apt=$work/later.apt deb epmd_port
    mkdir -p "$later_root" "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/parts"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n' >"$apt/list"
    : >"$apt/status"
    local options=(-qq -o "Dir::Etc::sourcelist=$apt/list" -o "Dir::Etc::sourceparts=$apt/parts" -o "Dir::Etc::preferencesparts=$apt/parts"
        -o "Dir::State::lists=$apt/lists" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt/cache"
        -o APT::Sandbox::User=root -o APT::Install-Recommends=0)
    { apt-get "${options[@]}" update && apt-get -y "${options[@]}" --download-only install rabbitmq-server base-files \
        dash bash coreutils sed grep mawk hostname util-linux findutils; } >"$apt/log" 2>&1 || { cat "$apt/log" >&2; exit 2; }
    # It makes the links to /usr that the others need.
    for deb in "$apt"/cache/archives/base-files*.deb "$apt"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$later_root"; done
    rm -rf "$apt"
    later_port=$(free_port)
    epmd_port=$(free_port)
    mkdir -p "$later_root/own"
    printf '127.0.0.1 localhost\n' >"$later_root/etc/hosts"
    printf 'listeners.tcp.1 = 127.0.0.1:%s\n' "$later_port" >"$later_root/own/rabbitmq.conf"
    printf '[].\n' >"$later_root/own/plugins"
    cat >"$later_root/own/start" <<SH
unset LD_LIBRARY_PATH
export PATH=/usr/bin:/usr/sbin HOME=/own LC_ALL=C.UTF-8 ERL_EPMD_PORT=$epmd_port ERL_EPMD_ADDRESS=127.0.0.1
export RABBITMQ_NODENAME=later-$$@localhost RABBITMQ_MNESIA_BASE=/own/data RABBITMQ_LOG_BASE=/own/log RABBITMQ_DIST_PORT=$(free_port)
export RABBITMQ_ENABLED_PLUGINS_FILE=/own/plugins RABBITMQ_CONFIG_FILE=/own/rabbitmq.conf RABBITMQ_CONF_ENV_FILE=/dev/null
export RABBITMQ_ADVANCED_CONFIG_FILE=/own/advanced.config RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
printf '[].\n' >/own/advanced.config
epmd -port $epmd_port -address 127.0.0.1 &
exec /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server
SH
    # Its own process identifiers: all that runs in it ends with it.
    unshare --mount --pid --fork --kill-child --mount-proc="$later_root/proc" bash -c \
        "mount --rbind /dev '$later_root/dev' && exec chroot '$later_root' /bin/sh /own/start" >"$work/later.log" 2>&1 &
    later_pid=$!
    for _ in $(seq 180); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$later_port") 2>/dev/null; then break; fi
        kill -0 "$later_pid" 2>/dev/null || { cat "$work/later.log" >&2; exit 2; }
        sleep 0.5
    done
    # shellcheck disable=SC2034
    later_version=$(basename "$later_root"/usr/lib/rabbitmq/lib/rabbitmq_server-* | sed 's/.*-//')
}
stop_later() {
    [ -z "${later_pid:-}" ] || { kill -KILL "$later_pid" && wait "$later_pid"; } 2>/dev/null || true
    stop_all
}
trap stop_later EXIT
