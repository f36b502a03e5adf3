# Archives as an image, a new tag for each change: docker build -t convscope/archives:0.1.0 -f deploy/kubernetes/archives.Dockerfile model_store
FROM debian:bookworm-slim
COPY *.mar* /models/
USER 10001:10001
