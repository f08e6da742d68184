# From a checkout: docker build -f docs/examples/model_server.Dockerfile -t model-server .
FROM python:3.12-slim
WORKDIR /src
COPY . .
# With [serve,grammar,cuda] for GPUs.
RUN pip install --no-cache-dir '.[serve,grammar]' && useradd --create-home server
USER server
# The run is mounted, and read only; the key is a file of the orchestrator.
#   docker run -p 8080:8080 -v ./runs/tiny:/run_of_model:ro -v ./key:/key:ro model-server
EXPOSE 8080
HEALTHCHECK --start-period=120s CMD python -c \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health')"
# No shell between it and SIGTERM.
ENTRYPOINT ["model-server", "--model-path=/run_of_model", "--host=0.0.0.0", "--api-key-file=/key"]
