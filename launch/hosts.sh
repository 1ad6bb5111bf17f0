# shellcheck shell=bash
# How launch/train.sh starts ranks on the hosts of HOSTFILE; sourced by it. DeepSpeed's launcher does, over pdsh and ssh:
# what it would get wrong is found here first, in one line, and what it would lose is packed (launch/on_host.sh).

# read_hosts: HOSTFILE's hosts and slots into the arrays `hosts` and `slots`.
read_hosts() {
    local line name more number=0
    [[ -f $HOSTFILE && -r $HOSTFILE ]] || die 2 "HOSTFILE=$HOSTFILE: there is no such file, or it cannot be read"
    HOSTFILE=$(realpath "$HOSTFILE")
    hosts=() slots=()
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        read -r name more <<<"${line%$'\r'}"
        [[ -n $name && $name != \#* ]] || continue
        # No other characters in a name: pdsh would take node[1-8] for eight hosts.
        [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9_.@-]*$ && $more =~ ^slots=([0-9]+)([[:space:]]+#.*|[[:space:]]*)$ ]] ||
            die 2 "$HOSTFILE, line $number: \"$line\" is not like \"node1 slots=8\""
        ((10#${BASH_REMATCH[1]} > 0)) || die 2 "$HOSTFILE, line $number: $name has no slots; leave it out"
        [[ " ${hosts[*]} " != *" $name "* ]] || die 2 "$HOSTFILE, line $number: $name stands there already"
        hosts+=("$name") slots+=("$((10#${BASH_REMATCH[1]}))")
    done <"$HOSTFILE"
    ((${#hosts[@]})) || die 2 "$HOSTFILE: no line such as \"node1 slots=8\" in it"
}

# is_here HOST: whether that is this machine.
is_here() { [[ " localhost 127.0.0.1 $(hostname) $(hostname -s 2>/dev/null) $(hostname -f 2>/dev/null) " == *" $1 "* ]]; }

# on HOST COMMAND: runs a line of shell there.
on() {
    local options
    read -ra options <<<"${PDSH_SSH_ARGS_APPEND:-}" # what pdsh will give to ssh
    ssh -n -o BatchMode=yes -o ConnectTimeout=20 "${options[@]}" "$1" "$2"
}

# check_hosts: whether each can be reached and has what the ranks need, and where they will meet.
check_hosts() {
    local host path status
    command -v pdsh >/dev/null || die 2 "HOSTFILE needs pdsh on this machine (on Debian: apt-get install pdsh)"
    for path in "$VENV" "$ROOT" "$PWD"; do
        [[ $path != *[[:space:]\"\'\\\`\$\&\;\|\<\>\(\)\[\]\{\}\*\?\!\#\~%]* ]] ||
            die 2 "$path: DeepSpeed's launcher does not start ranks on hosts of HOSTFILE under a path with such characters"
    done
    for host in "${hosts[@]}"; do
        status=0
        on "$host" "test -x $VENV/bin/grow && test -x $ROOT/launch/on_host.sh && test -d $PWD" >/dev/null || status=$?
        ((status != 255)) || die 2 "$HOSTFILE: $host cannot be reached: see that 'ssh $host true' asks for nothing here"
        ((status == 0)) || die 2 "$host: $VENV, $ROOT and $PWD must be there too, under these names"
    done
    [[ -n ${MASTER_ADDR:-} ]] || MASTER_ADDR=$(on "${hosts[0]}" "hostname -I" | awk '{ print $1; exit }') || true
    [[ -n $MASTER_ADDR ]] || die 2 "${hosts[0]} does not say what its address is; set MASTER_ADDR to it"
    port=$(free_port "${MASTER_PORT:-0}" on "${hosts[0]}") ||
        die 2 "MASTER_PORT=$MASTER_PORT: this port cannot be had on ${hosts[0]}; unset it"
}

# Variables that belong to this machine or this login, that the launcher sets for each rank, or that are secrets, which
# `ps` would show: these the hosts have their own of, or not.
OWN='^(_|HOME|HOST|HOSTNAME|IFS|KRB5CCNAME|LOGNAME|LS_COLORS|MAIL|OLDPWD|PWD|SHELL|SHLVL|TE?MP|TMPDIR|TERM.*|TMUX.*|USER'
OWN+='|BASH_ENV|DBUS_.*|DISPLAY|WAYLAND_DISPLAY|XAUTHORITY|XDG_.*|SSH_.*|SUDO_.*|SLURM_.*|PDSH_.*|DS_ENV_FILE|HOSTFILE|NPROC'
OWN+='|.*VISIBLE_DEVICES|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|MASTER_ADDR|MASTER_PORT'
OWN+='|.*(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|_KEY|_KEY_ID|APIKEY))$'
# Those that DeepSpeed's launcher itself hands on, in quotes that do not hold everything.
LAUNCHERS='^(MLFLOW|PYTHON|MV2|UCX|NCCL)'

# check_launchers_file: .deepspeed_env, here or at home, has variables that DeepSpeed's launcher sets on the hosts, each of
# them NAME=VALUE; their names into `named`, since they come before this shell's.
check_launchers_file() {
    local file name=${DS_ENV_FILE:-.deepspeed_env} line
    named=' '
    for file in "$HOME/$name" "$name"; do
        [[ $name != /* ]] || file=$name
        [[ -f $file ]] || continue
        while IFS= read -r line || [[ -n $line ]]; do
            [[ $line =~ ^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*= ]] ||
                die 2 "$file: \"$line\" is not like NAME=VALUE; DeepSpeed's launcher takes nothing else, no empty line either"
            named+="${BASH_REMATCH[1]} "
        done <"$file"
    done
}

# packed COMMAND…: the command in this folder and with this shell's variables, in letters that no shell changes.
packed() {
    local name
    {
        printf '%s\0' "--chdir=$PWD"
        for name in $(compgen -e); do
            [[ $name =~ $OWN || $named == *" $name "* ]] || printf '%s=%s\0' "$name" "${!name}"
        done
        printf '%s\0' "$@"
    } | gzip --best | base64 --wrap=0
}

on_hosts() { # on_hosts COMMAND…
    local without=() name command
    command=$(packed "$@")
    for name in $(compgen -e); do [[ ! $name =~ $LAUNCHERS ]] || without+=(--unset="$name"); done
    env "${without[@]}" deepspeed --no_local_rank --force_multi --no_ssh_check --log_level warning \
        --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR" --master_port "$port" \
        --no_python "$ROOT/launch/on_host.sh" "$command"
}
