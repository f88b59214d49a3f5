# Builds without a network from a wheelhouse that was made with one (docs/platforms.md):
#
#   python -m build --wheel --outdir wheelhouse
#   pip wheel --wheel-dir wheelhouse "$(ls wheelhouse/glua_bench-*.whl)[cluster]"
#   docker build --network none --tag glua-bench .
FROM python:3.11-slim

RUN useradd --home-dir /bench --create-home --uid 1000 bench
COPY wheelhouse /wheelhouse
RUN pip install --no-cache-dir --no-index --find-links /wheelhouse "glua-bench[cluster]" \
    && rm -rf /wheelhouse

USER bench
WORKDIR /bench
# Mount data, cache and results, e.g. --volume /path/to/data:/data:ro --volume "$PWD/runs:/bench/runs".
ENV GLUA_BENCH_DATA=/data GLUA_BENCH_CACHE=/bench/cache
ENTRYPOINT ["glua-bench"]
CMD ["--help"]
