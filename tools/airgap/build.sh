#!/usr/bin/env bash
# Gets every upstream image of the project: from a registry, or where none
# answers, built from Debian packages and Go modules under the same name.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$(cd "$here/../.." && pwd)/.cache/airgap
# shellcheck source=SCRIPTDIR/versions
source "$here/versions"

debian=debian:$DEBIAN-slim
golang=golang:$GO-$DEBIAN
caddy=caddy:$CADDY-builder
postgres=postgres:$POSTGRES-$DEBIAN
step_ca=smallstep/step-ca:$STEP_CA
prometheus=prom/prometheus:v$PROMETHEUS
# In this order, since the later ones stand on the earlier.
images=("$debian" "$golang" "$postgres" "$step_ca" "$caddy" "$prometheus")

usage() {
  cat <<TEXT
usage: tools/airgap/build.sh

Makes sure that Docker Compose v2 and these images are on this machine:

$(printf '  %s\n' "${images[@]}")

What is there is left alone. What is missing is pulled if a registry answers
within 10 seconds. If none does, it is built here under the same name, from the
Debian mirror and the Go module proxy that this machine is configured with; that
takes root, apt-get, Go and about 8 minutes on two cores (3 more for Compose).

Downloads, builds and the log of the last run are in .cache/airgap.
Exit codes: 0 all there, 1 failed, 2 misconfigured or usage.

examples:
  make images                          what is missing
  docker image rm $postgres
  tools/airgap/build.sh                one image anew
  docker image ls -f label=infra-pki.look-alike=true
                                       which images were built here
TEXT
}

die() { # code, error, [hint]
  printf 'airgap: error: %s\n' "$2" >&2
  [[ -z ${3-} ]] || printf 'airgap: hint: %s\n' "$3" >&2
  exit "$1"
}

have() { command -v "$1" >/dev/null; }
present() { docker image inspect "$1" >/dev/null 2>&1; }

# step WHAT COMMAND...: one line of progress; the output goes to the log.
step() {
  local what=$1 begin=$SECONDS rc=0
  shift
  printf '%s%s' "$prefix" "$what"
  printf '\n== %s%s\n' "$prefix" "$what" >>"$log"
  # In a subshell of its own, so that errexit holds inside COMMAND.
  set +e
  (
    set -e
    "$@"
  ) >>"$log" 2>&1
  rc=$?
  set -e
  if ((rc)); then
    printf ': failed (%d s), the log ends with:\n' $((SECONDS - begin))
    tail -n 20 "$log" | sed 's/^/    /' >&2
    die 1 "$what: exit code $rc" "the whole log is in $log; run again to go on from here"
  fi
  printf ' (%d s)\n' $((SECONDS - begin))
}

### Go

# Builds a program of a module as its makers do: in the module, so that its own
# go.mod with all its directives counts (go install PATH@VERSION refuses Compose,
# golang/go#44840). {time} in LDFLAGS becomes the time of the version.
go_build() { # module, version, package, ldflags, output
  local info dir time
  info=$(go mod download -json "$1@$2")
  dir=$(sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p' <<<"$info")
  time=$(sed -n 's/.*"Time":"\([^"]*\)".*/\1/p' "$(sed -n 's/^\t"Info": "\(.*\)",\{0,1\}$/\1/p' <<<"$info")")
  mkdir -p "$cache/bin"
  CGO_ENABLED=0 GOFLAGS='' go build -C "$dir" -trimpath -buildvcs=false \
    -ldflags "-s -w ${4//\{time\}/$time}" -o "$work/program" "$3"
  mv "$work/program" "$5"
}

# program MODULE VERSION PACKAGE LDFLAGS: builds it unless an earlier run did; its path is then in $bin.
program() {
  local name=${3##*/}
  [[ $name != cmd ]] || name=docker-compose
  bin=$cache/bin/$name-$2-go$GO
  [[ -e $bin ]] || step "compiling $name $2 from its Go module" go_build "$@" "$bin"
}

need_go() {
  have go || die 2 "looking for the go command: not found" "install Go 1.21 or newer; it fetches Go $GO by itself"
  export GOTOOLCHAIN=go$GO
  cd "$work" # no go.mod here that could interfere
}

### Compose

ensure_compose() {
  local version plugins=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins
  version=$(docker compose version --short 2>/dev/null || true)
  version=${version#v}
  if [[ ${version%%.*} =~ ^[0-9]+$ ]] && ((${version%%.*} >= 2)); then
    echo "docker compose $version: present"
    return
  fi
  prefix="docker compose $COMPOSE: "
  need_go
  program github.com/docker/compose/v2 "v$COMPOSE" ./cmd \
    "-X github.com/docker/compose/v2/internal.Version=v$COMPOSE"
  mkdir -p "$plugins"
  install -m 0755 "$bin" "$plugins/.docker-compose.$$"
  mv "$plugins/.docker-compose.$$" "$plugins/docker-compose"
  version=$(docker compose version --short) ||
    die 1 "running the new docker compose" "is another plug-in in its way? see: docker info"
  echo "docker compose $version: installed in $plugins"
}

### Images from a registry

# Begins to pull $1. "Pulling from" comes once a registry has answered with the
# manifest; this asks as the daemon does, with its proxies and mirrors, which
# "docker manifest inspect" does not. 0: pulled, 1: no answer, reason in $reason.
probe() {
  local out=$work/probe pid deadline=$((SECONDS + 10))
  : >"$out"
  docker pull "$1" </dev/null >"$out" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if grep -q 'Pulling from' "$out"; then
      echo "a registry answers, pulling"
      tail -n +1 -f --pid "$pid" "$out"
      wait "$pid" || die 1 "pulling $1" "run again to go on from here"
      return 0
    fi
    if ((SECONDS >= deadline)); then
      kill "$pid"
      wait "$pid" || true
      reason="no answer within 10 s"
      return 1
    fi
    sleep 0.2
  done
  wait "$pid" && return 0
  reason=$(tail -n 1 "$out")
  return 1
}

### Images built here

# The host's apt sources for this Debian release, one a line: URI suite.
debian_sources() {
  # shellcheck disable=SC2016 # fields of apt-get
  apt-get indextargets --format '$(REPO_URI) $(RELEASE)' \
    'Created-By: Packages' 'Origin: Debian' 'Component: main' |
    awk -v r="$DEBIAN" '$2 == r || $2 == r "-updates" || $2 == r "-security"' | sort -u
}

# The certificates of bundle $1 that are not in bundle $2, as files in directory $3.
extra_certificates() {
  awk -v dir="$3" '
    /-BEGIN CERTIFICATE-/ { pem = ""; inside = 1 }
    inside { pem = pem $0 "\n" }
    /-END CERTIFICATE-/ {
      inside = 0
      if (NR == FNR) known[pem] = 1
      else if (!(pem in known)) { known[pem] = 1; printf "%s", pem > (dir "/host-" ++n ".crt") }
    }' "$2" "$1"
}

need_debootstrap() {
  [[ $(id -u) == 0 ]] ||
    die 2 "building $debian: only root can" "run as root, or carry the images over with docker save and docker load"
  have apt-get ||
    die 2 "looking for apt-get: not found" "run on Debian or Ubuntu, or carry the images over with docker save and docker load"
  if [[ -z $(debian_sources) ]]; then
    step "reading the package lists" apt-get update
  fi
  if ! have debootstrap || [[ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ]]; then
    step "installing debootstrap" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y --no-install-recommends debootstrap debian-archive-keyring
  fi
  mirror=$(debian_sources | awk -v r="$DEBIAN" '$2 == r { print $1; exit }')
  [[ -n $mirror ]] ||
    die 2 "looking for Debian $DEBIAN in the apt sources of this host: not there" \
      "add a source for it, or carry the images over with docker save and docker load"
}

in_root() { chroot "$work/root" "$@"; }

debootstrap_root() {
  # debootstrap uses wget, which does not know apt's proxy.
  local proxy
  eval "$(apt-config shell proxy Acquire::http::Proxy)"
  [[ -z ${proxy-} ]] || export http_proxy=${http_proxy:-$proxy}
  # It mounts /proc in there. In a namespace of its own the mount ends with it, whatever kills it,
  # and removing the directory stays harmless.
  unshare --mount --propagation private debootstrap --variant=minbase --include=ca-certificates \
    --keyring=/usr/share/keyrings/debian-archive-keyring.gpg "$DEBIAN" "$work/root" "$mirror"
}

configure_root() {
  local root=$work/root uri suite
  rm -f "$root/etc/apt/sources.list"
  while read -r uri suite; do
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n' \
      "$uri" "$suite" /usr/share/keyrings/debian-archive-keyring.gpg
  done < <(debian_sources) >"$root/etc/apt/sources.list.d/debian.sources"
  # Proxies, and whether dated snapshots are accepted.
  apt-config dump | grep -E '^Acquire::(https?|Check-[A-Za-z-]+)(::[^ ]+)* "' >"$root/etc/apt/apt.conf.d/80host" || true # none is set
  cat >"$root/etc/apt/apt.conf.d/90image" <<'CONF'
Acquire::Languages "none";
APT::Install-Recommends "false";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };
CONF
  # A package that is installed during a build starts no daemon, leaves no manual.
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
  chmod +x "$root/usr/sbin/policy-rc.d"
  cat >"$root/etc/dpkg/dpkg.cfg.d/image" <<'CONF'
force-unsafe-io
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-include /usr/share/locale/locale.alias
path-exclude /usr/share/man/*
CONF

  # Egress may pass a proxy with a certificate of its own, which this host trusts.
  if [[ -e /etc/ssl/certs/ca-certificates.crt ]]; then
    extra_certificates /etc/ssl/certs/ca-certificates.crt \
      "$root/etc/ssl/certs/ca-certificates.crt" "$root/usr/local/share/ca-certificates"
    in_root update-ca-certificates
  fi
  in_root apt-get update
  in_root env DEBIAN_FRONTEND=noninteractive apt-get upgrade -y
}

pack_root() {
  local root=$work/root
  find "$root/usr/share/doc" -type f ! -name copyright -delete
  find "$root/usr/share/doc" -depth -type d -empty -delete
  find "$root/usr/share/locale" -mindepth 1 -maxdepth 1 ! -name locale.alias -exec rm -r {} +
  rm -rf "$root"/usr/share/{info,man}/* "$root"/var/lib/apt/lists/* "$root"/var/cache/{apt,debconf,ldconfig}/* \
    "$root"/var/log/* "$root"/tmp/* "$root"/etc/{resolv.conf,hostname}
  tar -C "$root" --numeric-owner --one-file-system --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' \
    -cf "$work/context/rootfs.tar" .
}

# docker_build IMAGE FOLDER DESCRIPTION [ARGUMENT...]: FOLDER and what is in $work/context make the context.
docker_build() {
  local image=$1 folder=$2 description=$3 args=() name
  shift 3
  for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
    [[ -z ${!name-} ]] || args+=(--build-arg "$name")
  done
  for name in "$@"; do args+=(--build-arg "$name"); done
  cp -a "$here/$folder/." "$work/context/"
  # The default builder sees the images of this host; another one may be selected. On the host's network
  # a mirror on localhost and the host's resolver work too.
  BUILDX_BUILDER=default docker build --network host --tag "$image" "${args[@]}" \
    --label infra-pki.look-alike=true \
    --label "org.opencontainers.image.description=look-alike of $image, $description" \
    "$work/context"
}

build_debian() {
  need_debootstrap
  step "unpacking Debian $DEBIAN" debootstrap_root
  step "adding this host's apt sources and certificates, upgrading" configure_root
  step "packing" pack_root
  step "making the image" docker_build "$debian" debian "from Debian packages by debootstrap"
}

# As one tar file: thousands of small ones would take the builder a minute more.
pack_go() {
  tar -C "$(go env GOROOT)" --transform 's,^\.,go,' --owner=0 --group=0 --mode=u+w \
    --exclude=./test --exclude=./api --exclude=./doc --exclude=testdata --exclude='*_test.go' \
    -cf "$work/context/go.tar" .
}

build_golang() {
  local args=(DEBIAN="$DEBIAN" GO="$GO") name
  need_go
  step "packing the Go $GO toolchain" pack_go
  for name in GOPROXY GOSUMDB GOPRIVATE GONOPROXY GONOSUMDB GOINSECURE; do
    args+=("$name=$(go env $name)")
  done
  step "installing git, making the image" docker_build "$golang" golang \
    "from Debian packages and the Go $GO toolchain, without a C compiler" "${args[@]}"
}

# Sets $package to the version of Debian package $2 that is the upstream version $3, if the
# mirror still offers it (the tag of image $1 says so), else to the newest.
find_package() {
  package=$(docker run --rm --network host "$debian" sh -c \
    "apt-get update -qq >/dev/null && apt-cache madison $2" |
    awk -v v="$3" 'NR == 1 { newest = $3 } index($3, v) == 1 && substr($3, length(v) + 1) ~ /^[-+]/ { print $3; found = 1; exit }
      END { if (!found) print newest }')
  [[ -n $package ]] || die 1 "looking for $2 on the Debian mirror: not there"
  [[ $package == "$3"[-+]* ]] ||
    echo "${prefix}warning: the Debian mirror has $package, the image is named $1 all the same"
}

build_postgres() {
  find_package "$postgres" postgresql-15 "$POSTGRES"
  step "installing Debian package postgresql-15 $package" docker_build "$postgres" postgres \
    "from Debian package postgresql-15 $package, without JIT" DEBIAN="$DEBIAN" VERSION="$package"
}

build_prometheus() {
  find_package "$prometheus" prometheus "$PROMETHEUS"
  step "unpacking Debian package prometheus $package" docker_build "$prometheus" prometheus \
    "from Debian package prometheus $package" DEBIAN="$DEBIAN" VERSION="$package"
}

build_step_ca() {
  need_go
  program github.com/smallstep/certificates "v$STEP_CA" ./cmd/step-ca \
    "-X main.Version=$STEP_CA -X main.BuildTime={time}"
  cp "$bin" "$work/context/step-ca"
  program github.com/smallstep/cli "v$STEP" ./cmd/step "-X main.Version=$STEP -X main.BuildTime={time}"
  cp "$bin" "$work/context/step"
  step "making the image" docker_build "$step_ca" step-ca \
    "from Go modules step-ca v$STEP_CA and step v$STEP and Debian packages, without step ca init" DEBIAN="$DEBIAN"
}

build_caddy() {
  need_go
  program github.com/caddyserver/xcaddy "v$XCADDY" ./cmd/xcaddy \
    "-X github.com/caddyserver/xcaddy/cmd.CustomVersion=v$XCADDY"
  cp "$bin" "$work/context/xcaddy"
  step "making the image" docker_build "$caddy" caddy "from Go module xcaddy v$XCADDY on the look-alike of $golang" \
    DEBIAN="$DEBIAN" GO="$GO" CADDY="$CADDY" XCADDY="$XCADDY"
}

### Main

case ${1-} in
  '') ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    die 2 "reading arguments: unknown argument \"$1\""
    ;;
esac

have docker || die 2 "looking for the docker command: not found" "install Docker Engine"
docker version >/dev/null 2>&1 ||
  die 2 "asking the Docker daemon for its version: no answer" "start it, and check that you may use it: docker version"

mkdir -p "$cache"
# Commands inherit the lock: what a killed run left running keeps it to its end.
exec 9>"$cache/lock"
if ! flock --nonblock 9; then
  echo "another run is at work, waiting for it"
  flock 9
fi
log=$cache/build.log
: >"$log"
rm -rf "$cache"/work.* # of a run that was killed
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

ensure_compose

missing=()
for image in "${images[@]}"; do
  if present "$image"; then echo "$image: present"; else missing+=("$image"); fi
done
((${#missing[@]})) || exit 0

if probe "${missing[0]}"; then
  for image in "${missing[@]:1}"; do
    docker pull "$image" || die 1 "pulling $image" "run again to go on from here"
  done
  exit 0
fi
echo "no registry answers ($reason), building ${#missing[@]} images here"

begin=$SECONDS
for i in "${!missing[@]}"; do
  prefix="[$((i + 1))/${#missing[@]}] ${missing[i]}: "
  rm -rf "$work"/{root,context}
  mkdir "$work/context"
  case ${missing[i]} in
    "$debian") build_debian ;;
    "$golang") build_golang ;;
    "$postgres") build_postgres ;;
    "$step_ca") build_step_ca ;;
    "$caddy") build_caddy ;;
    "$prometheus") build_prometheus ;;
  esac
done
echo "built ${#missing[@]} images in $((SECONDS - begin)) s"
