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

# glibc, libgcc and the system's certificates, for TLS to the database and the broker; no shell, and nobody's root.
FROM gcr.io/distroless/cc-debian12:nonroot
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="settled" \
      org.opencontainers.image.description="Settles asynchronous allocations from partners' signed messages on RabbitMQ, in PostgreSQL" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /out/settled /usr/local/bin/settled
USER 10001:10001
EXPOSE 9464
STOPSIGNAL SIGTERM
# Whether it runs; whether it is ready is asked by who waits for that. Of another program than the worker: another check.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=6 CMD ["/usr/local/bin/settled", "probe", "--live"]
ENTRYPOINT ["/usr/local/bin/settled"]
CMD ["worker"]
