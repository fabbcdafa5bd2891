#!/usr/bin/env bash
# RabbitMQ imports definitions with success and leaves a queue that exists as it was, without its dead-letter exchange.
#
# Seen with RabbitMQ 3.10.8 (Debian 12). A client that declares a queue with other arguments is refused (406), and one would
# expect an import of the same declaration to change it or to fail. It does neither: exit code 0, nothing on the error stream,
# no warning in the log. So a topology that is kept in a file and "applied" has a gap between what the file says and what the
# broker does, here rejected messages that are dropped instead of kept.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
say "RabbitMQ $broker_version"
definitions() {
    printf '{"exchanges":[{"name":"dlx","vhost":"/","type":"topic","durable":true,"auto_delete":false,"internal":false,"arguments":{}}],
        "queues":[{"name":"in","vhost":"/","durable":true,"auto_delete":false,"arguments":{"x-queue-type":"quorum"%s}}]}' "$1"
}
definitions '' >"$work/first.json"
definitions ',"x-dead-letter-exchange":"dlx"' >"$work/second.json"
complaints() { cat "$RABBITMQ_LOG_BASE"/*.log | grep -c '\[\(warning\|error\)\]' || true; }
before=$(complaints)
for file in first second; do
    rabbitmqctl -q import_definitions "$work/$file.json" >/dev/null 2>"$work/error" || changed "the $file import fails: $(cat "$work/error")"
    [ ! -s "$work/error" ] || changed "the $file import complains: $(cat "$work/error")"
done
sleep 3
{
    say "queue: $(rabbitmqctl -q list_queues name arguments | tail -n 1)"
    say "complaints in the log: $(($(complaints) - before))"
} | tee "$work/out"
printf '%s\n' $'queue: in\t[{"x-queue-type","quorum"}]' 'complaints in the log: 0' | diff - "$work/out" || changed "the import is not silent"
say "as found: imported, and not so"
