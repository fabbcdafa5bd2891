#!/usr/bin/env bash
# Prometheus: the share of payments done within a second is a quarter instead of a half when one worker exports from Python
# and one from Node, while the quantile of the same buckets is right.
#
# Seen with prometheus_client 0.26.0 (PyPI), prom-client 15.1.3 (npm), promtool 2.42.0 (Debian 12). A bucket's bound is a
# label, labels are text: Python writes le="1.0", Node le="1", each is a valid exposition. histogram_quantile reads the bounds
# as numbers and adds up what is the same, so graphs look right. A selector compares text: the usual objective, sum of le="1"
# by sum of all, counts one worker above the line and both below, with either spelling, and alerts on a service that is well
# (or, as 1 - share, hides one that is not).
cd "$(dirname "$0")"
. lib/debian.sh
python_with prometheus_client==0.26.0
node_with prom-client@15.1.3
get_debs prometheus
cat >"$work/python.py" <<'PY'
import prometheus_client
histogram = prometheus_client.Histogram('seconds', 'Time', buckets=[1, 10, 30])
for _ in range(100):
    histogram.observe(0.5)
    histogram.observe(20)
print(*(line for line in prometheus_client.generate_latest().decode().splitlines() if line.startswith('seconds_bucket')), sep='\n')
PY
cat >"$work/node.js" <<'JS'
const { Histogram, register } = require('prom-client');
const histogram = new Histogram({ name: 'seconds', help: 'Time', buckets: [1, 10, 30] });
for (let number = 0; number < 100; number++) { histogram.observe(0.5); histogram.observe(20); }
register.metrics().then((text) => console.log(text.split('\n').filter((line) => line.startsWith('seconds_bucket')).join('\n')));
JS
python "$work/python.py" >"$work/python.txt"
(cd "$work" && node node.js) >"$work/node.txt"
cat "$work/python.txt" "$work/node.txt"
measure() {
    {
        printf 'tests:\n- interval: 1m\n  input_series:\n'
        local worker=0 file expression
        for file in $1; do
            worker=$((worker + 1))
            sed -E "s/^(seconds_bucket)\{le=\"([^\"]*)\"\} (.*)/  - series: '\1{le=\"\2\",worker=\"$worker\"}'\n    values: '\3'/" "$work/$file.txt"
        done
        printf '  promql_expr_test:\n'
        for expression in 'histogram_quantile(0.4, sum by (le) (seconds_bucket))' \
            'sum(seconds_bucket{le="1"}) / sum(seconds_bucket{le="+Inf"})' 'sum(seconds_bucket{le="1.0"}) / sum(seconds_bucket{le="+Inf"})'; do
            printf "  - expr: '%s'\n    eval_time: 0\n    exp_samples: [{value: -1}]\n" "$expression"
        done
    } >"$work/test.yml"
    # What it got instead of -1.
    "$work/root/usr/bin/promtool" test rules "$work/test.yml" 2>&1 | sed -n 's/^ *got: *\({} \)*//p' | paste -sd ' '
}
for workers in 'python python' 'node node' 'python node'; do
    say "$workers: 0.4 quantile, share of le=\"1\", share of le=\"1.0\": $(measure "$workers")"
done | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "bounds are written or compared otherwise"
python python: 0.4 quantile, share of le="1", share of le="1.0": 8E-01 nil 5E-01
node node: 0.4 quantile, share of le="1", share of le="1.0": 8E-01 5E-01 nil
python node: 0.4 quantile, share of le="1", share of le="1.0": 8E-01 2.5E-01 2.5E-01
TXT
say "as found: half of them are not seen"
