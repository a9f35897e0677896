#!/usr/bin/env bash
# Builds an image that is labelled with the package's version and with the commit.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash docker/build.sh cpu|cuda [options of the engine's build]

  bash docker/build.sh cpu               docker/Dockerfile.cpu, as megatron-lite:cpu and megatron-lite:VERSION-cpu
  bash docker/build.sh cuda              docker/Dockerfile: A100 and H100
  bash docker/build.sh cuda --build-arg CUDA_ARCHS="80 90 100" --build-arg EXTRAS=wandb,tensorboard
                                         the build arguments stand at the top of each stage of the Dockerfiles

ENGINE names docker, podman or buildah (default: the first of them that is installed).
HELP
}

misuse() {
  printf 'error: %s; bash docker/build.sh --help shows how it is called\n' "$*" >&2
  exit 2
}

case ${1-} in
  -h | --help)
    usage
    exit 0
    ;;
  cpu) file=docker/Dockerfile.cpu ;;
  cuda) file=docker/Dockerfile ;;
  *) misuse "'${1-}' is no image: cpu or cuda" ;;
esac
image=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."

engine=${ENGINE-}
for candidate in docker podman buildah; do
  [ -n "$engine" ] || ! command -v "$candidate" >/dev/null || engine=$candidate
done
[ -n "$engine" ] || misuse "none of docker, podman and buildah is installed"
command -v "$engine" >/dev/null || misuse "ENGINE=$engine is not installed"

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' megatron_lite/__init__.py)
[ -n "$version" ] || misuse "megatron_lite/__init__.py has no line __version__ = \"...\""
# An archive of the sources has no commit, and its image no label that names one.
revision=$(git rev-parse HEAD 2>/dev/null || true)
[ -z "$revision" ] || [ -z "$(git status --porcelain)" ] || revision=$revision-dirty
# Only an address that others can read, without the password that may stand in it.
source=$(git remote get-url origin 2>/dev/null | sed -n 's#^https://\([^@/]*@\)\{0,1\}#https://#p' || true)

exec "$engine" build --file "$file" --tag "megatron-lite:$image" --tag "megatron-lite:$version-$image" \
  --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "SOURCE=$source" "$@" .
