# shellcheck shell=bash
# Sourced by the launchers: flags, messages, and commands that a dry run only prints.

DRY_RUN=false
FLAGS=' '

die() {
  printf '%s: error: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# usage TEXT...: the comment at the head of the launcher, for --help.
usage() {
  sed -n '2,/^$/{/^#/!q;s/^# \{0,1\}//;p}' "$0"
  exit 0
}

# flags NAME=DEFAULT...: declares them; --name=value sets the variable NAME.
flags() {
  local flag
  for flag; do
    FLAGS+="${flag%%=*} "
    printf -v "${flag%%=*}" '%s' "${flag#*=}"
  done
}

# parse ARGUMENT...: what comes after -- is in ARGUMENTS.
parse() {
  local name
  ARGUMENTS=()
  while (($#)); do
    case $1 in
    --help) usage ;;
    --dry_run) DRY_RUN=true ;;
    --)
      shift
      ARGUMENTS=("$@")
      return
      ;;
    --*=*)
      name=${1%%=*}
      name=${name#--}
      [[ $FLAGS == *" ${name^^} "* && $name == "${name,,}" ]] || die "no flag --$name; see --help"
      printf -v "${name^^}" '%s' "${1#*=}"
      ;;
    *) die "$1: flags are --name=value; see --help" ;;
    esac
    shift
  done
}

# parse_command COMMAND ARGUMENT...: likewise, of a launcher that has commands.
parse_command() {
  (($#)) || usage
  COMMAND=$1
  shift
  [[ $COMMAND != --help ]] || usage
  parse "$@"
}

# need NAME...: refuses where one of the flags was not given.
need() {
  local name
  for name; do
    [[ -n ${!name:-} ]] || die "--${name,,} is needed; see --help"
  done
}

# need_arguments: refuses where nothing came after --.
need_arguments() {
  ((${#ARGUMENTS[@]})) || die "give the arguments of \`embgemma train\` after --"
}

# number NAME...: refuses what is no positive whole number.
number() {
  local name
  for name; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "--${name,,}=${!name}: a positive number is needed"
  done
}

# quoted ARGUMENT...: as one line that a shell reads back.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# run COMMAND...: does it, or prints it.
run() {
  if [[ $DRY_RUN == true ]]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}
