# A CPU image that serves a checkpoint:
#   docker build -t llava-simplified .
#   docker run -p 8000:8000 -v /path/to/checkpoint:/checkpoint llava-simplified
FROM python:3.11-slim
RUN useradd --create-home llava
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY llava_simplified llava_simplified
# On Linux, pip installs PyTorch with several gigabytes of CUDA libraries. For a small image pass the address of
# PyTorch's CPU package index: docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ...
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install --no-cache-dir -c constraints.txt '.[serve]'
USER llava
EXPOSE 8000
ENTRYPOINT ["llava"]
CMD ["serve", "/checkpoint", "--host", "0.0.0.0"]
