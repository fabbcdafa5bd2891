//! Strict JSON: what serde_json accepts, without duplicate keys, with numbers as their literal text and a bound on depth.
