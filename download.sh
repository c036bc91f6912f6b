#!/usr/bin/env bash
#
# Download the weights of Llama 2 to 3.3 with the signed link that Meta sends by e-mail.
# "./download.sh --help" explains how. Runs on bash 3.2 (macOS) and later.

set -efuo pipefail # -f: no pathname expansion
export LC_ALL=C    # the tools' output must not depend on the locale

# If the caller has exported a variable of the same name, ours would be exported too, even a local
# one, and leak the link into the environment of every tool. A test keeps this list complete.
set +a
unset -v ANSWER CHILD FETCHED FETCHER FOLDER FOLDERS LOCK MD5 OTHER_KIB PAUSE PIECE PREFIX PRESENT \
  REMOTE RESULT SHARDS SHARD_KIB STALL STATUS SUM TRIES TYPE URL_HEAD URL_TAIL USAGE all args dir \
  file folder found good had have_models here host i key kib lines list models more name out page \
  part path pid policy range rc rest resumed script seconds shard start sum sums try url value

TRIES=5                          # requests per file before giving up
PAUSE=${LLAMA_DOWNLOAD_PAUSE:-2}  # seconds before the 2nd request; grows with each one
STALL=${LLAMA_DOWNLOAD_STALL:-60} # seconds below 1 KiB/s, or without data, that end a request
PIECE=$((25 * 1024 * 1024 * 1024)) # bytes per request of a shard that Meta's server refuses whole
SHARD_KIB=$((100 * 1024 * 1024))  # larger than any shard: limit for a server that never stops
OTHER_KIB=$((100 * 1024))         # larger than any other file
FETCHED=0 PRESENT=0
LOCK='' CHILD=''
USAGE='Usage: ./download.sh [--url URL] [--models "LIST"] [--dir DIR]
       ./download.sh --verify DIR'

help() {
  say "$USAGE"
  cat <<'TEXT'

Downloads Llama weights with a signed link, and prompts for missing options.
Run it again after an interruption: it resumes where it stopped. Meta's e-mail has
a link for each family (Llama 2, 3, 3.1 ...): run it once per family.

  --url URL        the link from Meta's e-mail, including the *. Leave it out and
                   paste it when prompted, to keep it out of the shell's history.
  --models "LIST"  models to download, separated by commas or spaces (see below)
  --dir DIR        where the model folders go (default: the current directory)
  --verify DIR     only check the files of one model folder against its checklist.chk
                   (and tokenizer_checklist.chk, if DIR has one); uses no network
  --help           show this text

TEXT
  model_names
  cat <<'TEXT'

LLAMA_DOWNLOAD_PAUSE (environment): seconds before a failed download is retried;
twice, three times ... as long before further retries (default 2).
LLAMA_DOWNLOAD_STALL (environment): seconds below 1 KiB/s (wget: without data) before
a download is aborted (default 60); a small file may take ten times as long in total.
TEXT
}

# The models: folder (the published name), number of shards, path on the server if it differs, and
# short name. Weights that the library refuses (quantized, or with image input) are left out.
models() {
  cat <<'TABLE'
Llama-3.3-70B-Instruct        8
Llama-3.2-1B                  1
Llama-3.2-1B-Instruct         1
Llama-3.2-3B                  1
Llama-3.2-3B-Instruct         1
Llama-3.1-8B                  1
Llama-3.1-8B-Instruct         1
Llama-3.1-70B                 8
Llama-3.1-70B-Instruct        8
Llama-3.1-405B-MP8            8
Llama-3.1-405B-MP16           16
Llama-3.1-405B-Instruct-MP8   8
Llama-3.1-405B-Instruct-MP16  16
Meta-Llama-3-8B               1   8b_pre_trained          8B
Meta-Llama-3-8B-Instruct      1   8b_instruction_tuned    8B-instruct
Meta-Llama-3-70B              8   70b_pre_trained         70B
Meta-Llama-3-70B-Instruct     8   70b_instruction_tuned   70B-instruct
llama-2-7b                    1   llama-2-7b              7B
llama-2-7b-chat               1   llama-2-7b-chat         7B-chat
llama-2-13b                   2   llama-2-13b             13B
llama-2-13b-chat              2   llama-2-13b-chat        13B-chat
llama-2-70b                   8   llama-2-70b             llama-2-70B
llama-2-70b-chat              8   llama-2-70b-chat        70B-chat
TABLE
}

model_names() {
  say "Models (upper or lower case; folder names such as Meta-Llama-3-8B work too):"
  models | awk '
    { name = NF > 3 ? $4 : $1; sub(/^Meta-/, "", $1); split($1, part, "-") }
    NR > 1 && part[2] != last { print line }
    part[2] != last { last = part[2]; line = "  Llama " last ": " name; next }
    length(line name) > 75 { print line ","; line = "    " name; next }
    { line = line ", " name }
    END { print line }'
  cat <<'TEXT'
"70B" alone is Llama 3; any Llama 2 name may be written with llama-2- in front.
MP8 and MP16 are the same weights in 8 and 16 shards.
TEXT
}

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "download.sh: $*" >&2; }
die() { warn "$*"; exit 1; }
bad_usage() { warn "$*"; say "$USAGE (--help for more)" >&2; exit 2; }

# find_model NAME: set FOLDER (published name), SHARDS and REMOTE (path on the server). Meta's own
# tool also writes Llama3.1 for Llama-3.1, and its older releases Meta-Llama-3.1.
find_model() {
  read -r FOLDER SHARDS REMOTE < <(models | awk -v name="$1" '
    function key(name) {
      name = tolower(name)
      sub(/^meta-/, "", name)
      sub(/^llama3\./, "llama-3.", name)
      sub(/^llama-3-/, "", name)
      return name
    }
    key(name) == key($1) || (NF > 3 && key(name) == key($4)) {
      print $1, $2, (NF > 2 ? $3 : $1)
      exit
    }')
}

# choose_models LIST: set FOLDERS, without repeats.
choose_models() {
  local name
  FOLDERS=()
  for name in ${1//,/ }; do
    name=${name#meta-llama/}
    # A link broken over two lines ends up here: its second half must not be shown.
    [[ ${#name} -le 40 && $name != *[!A-Za-z0-9._-]* ]] ||
      bad_usage "the list of models has invalid names (was the link broken over two lines?)"
    find_model "$name" || { model_names >&2; bad_usage "unknown model: $name"; }
    case " ${FOLDERS[*]-} " in *" $FOLDER "*) ;; *) FOLDERS+=("$FOLDER") ;; esac
  done
  [[ -n ${FOLDERS[*]-} ]] || choose_models "8B 8B-instruct 70B 70B-instruct"
}

# split_url URL: the * in the link is a placeholder for a file's path; keep the text on each side.
split_url() {
  local url=$1 here='^http://(127\.0\.0\.1|localhost)(:[0-9]+)?/'
  url=${url#"${url%%[![:space:]]*}"} # pasting may add whitespace on either side
  url=${url%"${url##*[![:space:]]}"}
  [[ -n $url ]] || bad_usage "no link given"
  # None of these belongs in a URL; curl's config would interpret a quote or backslash
  [[ $url != *[[:space:][:cntrl:]\"\\]* ]] || bad_usage "the link has a space, line break," \
    "quote or backslash in it: copy it again, in one piece"
  # Plain HTTP only from this machine, for tests
  [[ $url == https://* || $url =~ $here ]] || bad_usage "the link must start with https://"
  [[ ${url%%\?*} == *\** ]] || bad_usage "the link has no * in its path: copy the text of the" \
    "link from the e-mail, not the address a browser shows"
  URL_HEAD=${url%%\**} URL_TAIL=${url#*\*}
}

# ask PROMPT: set ANSWER. -e because a terminal's own line editing may be limited to 1024 bytes,
# which is about the length of a signed link.
ask() {
  ANSWER=''
  IFS= read -r -e -p "$1" ANSWER || [[ -n $ANSWER ]]
}

find_md5() {
  if command -v md5sum >/dev/null; then MD5=md5sum
  elif command -v md5 >/dev/null; then MD5=md5
  else die "neither md5sum nor md5 is installed: install one of them to check the files"; fi
}

find_fetcher() {
  if command -v curl >/dev/null; then FETCHER=curl
  # BusyBox's wget cannot read the link from its input
  elif [[ $(wget --version 2>/dev/null || :) == *GNU\ Wget* ]]; then FETCHER=wget
  else die "neither curl nor GNU wget is installed: install one of them and run this again"; fi
}

# has_sum FILE SUM: whether FILE has this md5.
has_sum() {
  local out
  if [[ $MD5 == md5sum ]]; then out=$(md5sum <"$1"); else out=$(md5 -q "$1"); fi
  [[ ${out%% *} == "$2" ]]
}

# read_list CHECKLIST: print "md5 name" lines; fail if anything in it is not such a line.
# The list is untrusted: a name must not escape the folder or look like an option. Llama 3.2's
# lists put ./ in front of the names.
read_list() {
  awk '{ sub(/\r$/, "") }
    NF == 0 { next }
    { name = $2; sub(/^\*/, "", name); sub(/^\.\//, "", name) }
    NF != 2 || length($1) != 32 || $1 ~ /[^0-9A-Fa-f]/ { bad = 1; exit }
    name == "" || name ~ /[^A-Za-z0-9._-]/ || name ~ /^[-.]/ || name ~ /\.\./ { bad = 1; exit }
    { print tolower($1), name; lines++ }
    END { exit (bad || !lines) }' <"$1"
}

# find_sum SUMS NAME: set SUM to the md5 of NAME in read_list's output, or to the empty string.
find_sum() {
  local lines=$'\n'$1$'\n'
  lines=${lines%%" $2"$'\n'*}
  SUM=${lines##*$'\n'}
}

size() { # FILE: print its size, 0 if there is none
  if [[ -e $1 ]]; then wc -c <"$1"; else echo 0; fi
}

# in_pieces PATH: whether to request PATH in pieces. The server answers a request for more than
# 50 GiB with HTTP 400; Meta's own tool takes all shards of the 405B in pieces.
in_pieces() {
  [[ $1 == *-405B-*.pth ]]
}

is_page() { # whether the file starts like a web page or an XML error message
  local start
  start=$(head -c 512 "$1" | tr -d '\000' | tr '[:upper:]' '[:lower:]')
  [[ $start == *'<!doctype html'* || $start == *'<html'* || $start == '<?xml'* ]]
}

# is_right FILE NAME SUM: whether FILE has the right content for NAME, as far as can be checked.
is_right() {
  [[ -s $1 ]] || return 1
  if [[ -n $3 ]]; then has_sum "$1" "$3"; return; fi
  ! is_page "$1" || return 1
  case $2 in *checklist.chk) read_list "$1" >/dev/null ;; esac
}

# request PATH PART START: one request, which resumes PART at START, its size. Sets STATUS (HTTP,
# 000 if none came), TYPE (content type) and RESULT (done, norange, disk, toolong, or the tool's
# error).
# The link is passed on standard input, through a pipe: arguments show in "ps", and a
# here-document would be a temporary file. Redirects are not followed: the link is signed for one
# server. The user's own settings of the tools (~/.curlrc, ~/.wgetrc) are ignored, since they may
# follow redirects, log the link, or write other files; proxies from the environment are used.
request() {
  local args key value rest rc=0 url=$URL_HEAD$1$URL_TAIL kib=$OTHER_KIB seconds=$((10 * STALL))
  local range="Range: bytes=$3-$(($3 + PIECE - 1))"
  if [[ $1 == *.pth ]]; then kib=$SHARD_KIB seconds=0; fi # 0: no limit
  STATUS='' TYPE='' RESULT=''
  if [[ $FETCHER == curl ]]; then
    # --disable must come first
    args=(curl --disable --globoff --fail --connect-timeout 30 --max-time "$seconds"
      --speed-limit 1024 --speed-time "$STALL" --continue-at - --output "$2"
      --write-out '%{http_code} %{content_type}' --config -)
    if [[ -t 2 ]]; then args+=(--progress-bar); else args+=(--silent --show-error); fi
    if in_pieces "$1"; then args+=(--header "$range"); fi
    fetch "$kib" "url = \"$url\"" "${args[@]}" || rc=$?
    read -r STATUS TYPE <"$LOCK/answer" || :
    case $rc in 23) RESULT=disk ;; 33) RESULT=norange ;; esac
  else
    args=(wget --no-config --no-netrc --no-hsts --quiet --server-response
      --output-file=/dev/stdout --tries=1 --timeout="$STALL" --max-redirect=0 --continue
      --output-document="$2" --input-file=-)
    if [[ -t 2 ]]; then args+=(--show-progress --progress=bar:force:noscroll); fi
    if in_pieces "$1"; then args+=(--header="$range"); fi
    # wget has no limit for the whole request; not every system has timeout
    if command -v timeout >/dev/null; then args=(timeout "$seconds" "${args[@]}"); fi
    fetch "$kib" "$url" "${args[@]}" || rc=$?
    while read -r key value rest; do
      case $key in
        HTTP/*) STATUS=$value TYPE='' ;;
        [Cc]ontent-[Tt]ype:) TYPE=$value ;;
      esac
    done <"$LOCK/answer"
    [[ $rc != 3 ]] || RESULT=disk
  fi
  [[ $STATUS == [0-9][0-9][0-9] ]] || STATUS=000 # it is printed, and may be anything
  [[ -n $RESULT ]] || RESULT="$FETCHER error $rc"
  [[ $rc != 0 ]] || RESULT='done'
  [[ $RESULT != disk || $(size "$2") -lt $((kib * 1024)) ]] || RESULT=toolong
  [[ -s $2 ]] || rm -f "$2"
}

# fetch KIB INPUT COMMAND...: run the command with INPUT as its standard input and a size limit on
# the files it writes. Its output goes into the lock, which is private: a server may echo the link.
# Runs in the background: bash handles signals while waiting for a job, but not during a command.
fetch() {
  (limit_size "$1" && exec "${@:3}") < <(printf '%s\n' "$2") >"$LOCK/answer" &
  await
}

pause() { # SECONDS
  sleep "$1" &
  await
}

await() { # wait for the latest job
  local rc=0
  CHILD=$!
  wait "$CHILD" || rc=$?
  CHILD=''
  return "$rc"
}

# stop CODE: after a signal, kill the running tool and exit.
stop() {
  trap '' INT TERM HUP
  if [[ -n $CHILD ]]; then
    kill "$CHILD" 2>/dev/null || :
    wait "$CHILD" 2>/dev/null || :
  fi
  warn "stopped; run this again to resume"
  exit "$1"
}

# lock PART: two runs must not write to the same file. The stale lock of a killed run is removed.
lock() {
  local pid='' host=''
  until mkdir -m 700 "$1.lock" 2>/dev/null; do
    [[ -d $1.lock ]] || die "cannot create $1.lock: choose another folder with --dir"
    read -r pid host 2>/dev/null <"$1.lock/owner" || :
    if [[ $host != "$HOSTNAME" || $pid == *[!0-9]* ]] || kill -0 "$pid" 2>/dev/null ||
      [[ -e /proc/$pid ]]; then
      die "another download.sh (process ${pid//[!0-9]/}) is writing to $1: wait until it has" \
        "ended. If there is none, remove the folder $1.lock"
    fi
    rm -rf "$1.lock"
  done
  LOCK=$1.lock
  printf '%s\n' "$$ $HOSTNAME" >"$LOCK/owner"
}

unlock() {
  [[ -z $LOCK ]] || rm -rf "$LOCK"
  LOCK=''
}

limit_size() { # KIB: limit the size of files written from here on; larger writes fail
  trap '' XFSZ
  ulimit -S -f "$1" 2>/dev/null || : # a lower limit may be set already
}

die_page() {
  die "the server sent a web page instead of $1: the link has probably expired or was copied" \
    "wrongly. Ask Meta for a new one and run this again"
}

die_wrong() { # PATH PART SUM: remove a file that was downloaded completely, but is wrong
  local page=no
  if [[ -s $2 ]] && is_page "$2"; then page=yes; fi
  rm -f "$2"
  [[ $page == no ]] || die_page "$1"
  [[ -n $3 ]] || die "the server's $1 is empty or not a valid checklist: run this again"
  die "wrong checksum for $1: it was damaged in transfer, and is removed. Run this again to" \
    "download it; if that does not help, delete its checklist as well"
}

# transfer PATH PART SUM: download PART, with a limited number of requests. Returns when the server
# has nothing more to send; the caller checks PART.
transfer() {
  local path=$1 part=$2 sum=$3 try=1 more=no start had
  while :; do
    # Without a checksum, nothing would tell whether the two halves belong together
    [[ -n $sum || $more == yes ]] || rm -f "$part"
    more=no
    start=$(size "$part")
    had=no; [[ $start -eq 0 ]] || had=yes
    request "$path" "$part" "$start"
    [[ $RESULT != disk ]] || die "cannot write $part: the disk is full (or writing is not" \
      "allowed there). Free some space and run this again; it resumes where it stopped"
    if [[ $RESULT == toolong ]]; then
      rm -f "$part"
      die "the server sends more for $path than any such file has: check the link"
    fi
    case $STATUS in
      200 | 206)
        if [[ $TYPE == text/html* ]]; then
          [[ $had == yes ]] || rm -f "$part" # keep the data of an earlier run
          die_page "$path"
        fi
        if [[ $RESULT == 'done' ]]; then
          # A full piece: ask for the next one, which is shorter or missing (416) at the end
          [[ $STATUS == 206 && $(size "$part") -eq $((start + PIECE)) ]] && in_pieces "$path" ||
            return 0
          more=yes try=1
          continue
        fi
        # No range support: start over rather than append a whole file to a partial one
        [[ $RESULT != norange ]] || rm -f "$part" ;;
      30?) die "the server redirects to another address for $path (HTTP $STATUS), which is not" \
        "followed: check the link, or ask Meta for a new one" ;;
      401 | 403) die "access refused for $path (HTTP $STATUS): the link has expired (after a" \
        "day or two) or is for another model. Ask Meta for a new one and run this again" ;;
      404 | 410) die "the server has no $path (HTTP $STATUS): the link is probably for another" \
        "model. Check the models, or ask Meta for a link for this one" ;;
      416)
        [[ $had == no ]] || return 0 # PART is complete, or too long
        die "the server refused to send $path (HTTP 416): run this again later" ;;
      000 | 1?? | 408 | 429 | 5??) ;;
      *) die "the server gave an unexpected answer for $path (HTTP $STATUS): check the link" ;;
    esac
    [[ $try -lt $TRIES ]] || die "gave up on $path after $TRIES attempts (HTTP $STATUS, $RESULT):" \
      "check the network and run this again; it resumes where it stopped"
    [[ $RESULT == norange ]] || warn "$path: interrupted (HTTP $STATUS, $RESULT); trying again"
    pause $((PAUSE * try))
    try=$((try + 1))
  done
}

# get PATH FILE [SUMS]: download FILE; SUMS is the output of read_list for its checklist.
# It is written to FILE.part, and renamed to FILE once it is verified.
get() {
  local path=$1 file=$2 part=$2.part name=${2##*/} sum resumed
  find_sum "${3-}" "$name"
  sum=$SUM
  [[ ! -d $file && ! -d $part ]] || die "$file or $part is a folder: move it away"
  lock "$part"
  if is_right "$file" "$name" "$sum"; then
    PRESENT=$((PRESENT + 1))
    unlock
    say "  $name: already here"
    return
  fi
  if [[ -e $file ]]; then
    warn "$file is damaged or incomplete: downloading it again"
    if [[ -e $part ]]; then rm -f "$file"; else mv -f "$file" "$part"; fi
  fi
  say "  $name"
  while :; do
    resumed=no
    [[ -z $sum || ! -s $part ]] || resumed=yes
    transfer "$path" "$part" "$sum"
    if is_right "$part" "$name" "$sum"; then
      mv -f "$part" "$file"
      FETCHED=$((FETCHED + 1))
      unlock
      return
    fi
    if [[ $resumed == no ]]; then die_wrong "$path" "$part" "$sum"; fi
    rm -f "$part"
    warn "$path: the earlier partial download does not match the server's file; starting over"
  done
}

get_model() { # FOLDER
  local dir=$PREFIX$1 list=$PREFIX$1/checklist.chk policy=USE_POLICY.md sums i shard
  find_model "$1"
  say "$1:"
  if ! mkdir -p "$dir" || [[ ! -w $dir ]]; then
    die "cannot create the folder $dir or write to it: choose another folder with --dir"
  fi
  # Next to the weights, so that they do not overwrite those of a project in the parent folder
  case $1 in
    Meta-Llama-3-*) policy=USE_POLICY ;;
    Llama-3.[23]-*) policy='' ;; # no published tool requests them from the server
  esac
  if [[ -n $policy ]]; then
    get LICENSE "$dir/LICENSE"
    get "$policy" "$dir/$policy"
  fi
  get "$REMOTE/checklist.chk" "$list"
  sums=$(read_list "$list")
  get "$REMOTE/params.json" "$dir/params.json" "$sums"
  case $1 in
    llama-2-*) # one tokenizer for all, in the parent folder
      get tokenizer_checklist.chk "${PREFIX}tokenizer_checklist.chk"
      get tokenizer.model "${PREFIX}tokenizer.model" \
        "$(read_list "${PREFIX}tokenizer_checklist.chk")" ;;
    *) get "$REMOTE/tokenizer.model" "$dir/tokenizer.model" "$sums" ;;
  esac
  for ((i = 0; i < SHARDS; i++)); do
    shard=$(printf 'consolidated.%02d.pth' "$i")
    find_sum "$sums" "$shard"
    [[ -n $SUM ]] || warn "$list has no checksum for $shard: it cannot be verified"
    get "$REMOTE/$shard" "$dir/$shard" "$sums"
  done
}

summary() {
  local folder script
  say "Done: $FETCHED files downloaded, $PRESENT were already here. To run:"
  case " ${FOLDERS[*]}" in
    *" llama-2-"*) say '  pip install -e ".[llama2]"  # once, for the tokenizer of Llama 2' ;;
  esac
  for folder in "${FOLDERS[@]}"; do
    find_model "$folder"
    case $folder in
      *-Instruct* | *-chat) script=example_chat_completion.py ;;
      *) script=example_text_completion.py ;;
    esac
    printf '  torchrun --nproc_per_node %s %s --ckpt_dir %q\n' "$SHARDS" "$script" "$PREFIX$folder"
  done
  say "That is one process per shard. Other numbers that divide the model work as well; for 1," \
    "plain python can replace torchrun."
}

# verify DIR: check every listed file; report all of them before failing.
verify() {
  local list sum name file all=0 good=0 found=no
  [[ -d $1 ]] || die "no such folder: $1"
  set_prefix "$1"
  for list in "${PREFIX}checklist.chk" "${PREFIX}tokenizer_checklist.chk"; do
    [[ -f $list ]] || continue
    found=yes
    read_list "$list" >/dev/null || die "$list is not a list of checksums and plain file names:" \
      "delete it and run the download again"
    while read -r sum name; do
      file=$PREFIX$name
      # Llama 3.2 3B Instruct's list has this file, which Meta's own tool does not download either
      if [[ $name == orig_params.json && ! -e $file ]]; then continue; fi
      all=$((all + 1))
      if [[ ! -f $file ]]; then warn "$file: missing"
      elif ! has_sum "$file" "$sum"; then warn "$file: wrong checksum"
      else say "$file: OK"; good=$((good + 1)); fi
    done < <(read_list "$list")
  done
  [[ $found == yes ]] || die "$1 has no checklist.chk: give the folder of one model"
  [[ $good == "$all" ]] || die "$((all - good)) of $all files are missing or wrong: run the" \
    "download again to fetch them"
  say "All $good files are OK."
}

set_prefix() { # DIR: the path before a file's name; it must not look like an option
  PREFIX=${1%/}/
  case $PREFIX in ./) PREFIX='' ;; -*) PREFIX=./$PREFIX ;; esac
}

main() {
  local url='' models='' have_models=no folder
  PREFIX=''
  while [[ $# -gt 0 ]]; do
    case $1 in
      --help | -h) help; exit 0 ;;
      --url | --models | --dir | --verify)
        [[ $# -ge 2 && -n $2 ]] || bad_usage "$1 needs a value" ;;
      # Neither message repeats an argument that may be the link
      -*) bad_usage "unknown option: ${1%%=*}" ;;
      *) bad_usage "unexpected argument (a link is given with --url)" ;;
    esac
    case $1 in
      --url) url=$2 ;;
      --models) models=$2 have_models=yes ;;
      --dir) set_prefix "$2" ;;
      --verify) find_md5; verify "$2"; exit 0 ;;
    esac
    shift 2
  done
  [[ $PAUSE =~ ^[1-9]?[0-9]$ ]] || die "LLAMA_DOWNLOAD_PAUSE must be 0 to 99 seconds"
  [[ $STALL =~ ^[1-9][0-9]{0,3}$ ]] || die "LLAMA_DOWNLOAD_STALL must be 1 to 9999 seconds"
  find_md5
  find_fetcher
  [[ -n $url ]] || { ask "Signed link from Meta's e-mail (with the *): " || :; url=$ANSWER; }
  split_url "$url"
  if [[ $have_models == no ]]; then
    model_names >&2
    ask "Which models? (Enter for all four of Llama 3): " || bad_usage "no models given"
    models=$ANSWER
  fi
  choose_models "$models"
  trap unlock EXIT
  trap 'stop 130' INT
  trap 'stop 143' TERM
  trap 'stop 129' HUP
  for folder in "${FOLDERS[@]}"; do get_model "$folder"; done
  summary
}

main "$@"
