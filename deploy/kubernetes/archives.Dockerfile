# Archives as an image, a new tag for each change: docker build -t convscope/archives:0.1.0 -f deploy/kubernetes/archives.Dockerfile model_store
ARG DEBIAN=debian:bookworm-slim
FROM ${DEBIAN}
COPY *.mar* /models/
USER 10001:10001
