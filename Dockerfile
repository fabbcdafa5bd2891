# syntax=docker/dockerfile:1
# The worker as an image: built with the C compiler that secp256k1 needs, run without it and without root.

FROM rust:1.95-bookworm AS build
WORKDIR /build
# So that the program carries the list of what it was built of.
RUN cargo install cargo-auditable --version =0.7.7 --locked
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo auditable build --release --locked && install -D target/release/settled /out/settled

FROM debian:bookworm-slim
# The system's certificates, for TLS to the database and the broker.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent settled
COPY --from=build /out/settled /usr/local/bin/settled
USER 10001:10001
EXPOSE 9464
STOPSIGNAL SIGTERM
ENTRYPOINT ["settled"]
CMD ["worker"]
