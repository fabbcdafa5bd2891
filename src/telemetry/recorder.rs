//! Where the numbers are kept: what `/metrics` shows.

use std::sync::OnceLock;

use metrics::with_local_recorder;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tracing::warn;

use super::catalogue::{ALL, BUILD_INFO};
use super::metric::MetricKind;

/// Makes this process count. Later calls return the same handle: the recorder belongs to the process, as the metrics
/// crate has it.
pub fn install_metrics() -> PrometheusHandle {
    static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let recorder = recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                warn!("another metrics recorder is installed; /metrics stays empty");
            }
            handle
        })
        .clone()
}

/// A recorder that knows every metric, its buckets and its help, with everything that can be zero at zero.
pub(super) fn recorder() -> PrometheusRecorder {
    let with_buckets = |builder: PrometheusBuilder, (name, buckets): (&str, &[f64])| {
        builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
    };
    let buckets = ALL.iter().filter_map(|metric| match metric.kind {
        MetricKind::Histogram(buckets) => Some((metric.name, buckets)),
        MetricKind::Counter | MetricKind::Gauge => None,
    });
    // It fails for an empty list of buckets only; a summary would then be shown instead of a histogram.
    let builder = buckets.into_iter().try_fold(PrometheusBuilder::new(), with_buckets);
    let recorder = builder.unwrap_or_default().build_recorder();
    with_local_recorder(&recorder, || {
        for metric in ALL {
            metric.describe();
            metric.start();
        }
        BUILD_INFO.set([env!("CARGO_PKG_VERSION").into()], 1.0);
    });
    recorder
}
