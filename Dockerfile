# Images for people who publish their own:
#
#   docker build --target manager   --tag registry.example.com/millrace/manager:v1   .
#   docker build --target processor --tag registry.example.com/millrace/processor:v1 .
#
# Tests and the demo build theirs without Docker (make images); both hold one static binary, with the certificates of the public authorities in it, and run as
# user 65532.

FROM --platform=$BUILDPLATFORM docker.io/library/golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY api api
COPY cmd cmd
COPY internal internal
ARG TARGETOS=linux
ARG TARGETARCH
ENV CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOCACHE=/go/build
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/go/build \
    go build -trimpath -buildvcs=false -ldflags "-s -w -buildid=" -o /out/ ./cmd/manager ./cmd/processor

FROM scratch AS processor
COPY --from=build /out/processor /processor
USER 65532:65532
ENTRYPOINT ["/processor"]

FROM scratch AS manager
COPY --from=build /out/manager /manager
USER 65532:65532
ENTRYPOINT ["/manager"]
