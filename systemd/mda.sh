#!/bin/sh
# Written by `mda install`, removed by `mda uninstall`: what stands between an MTA and a
# Python that does not start.

# An MTA bounces the mail when its delivery command ends with 1, 2, 126 or 127, which is how
# an interpreter ends that a system upgrade has broken: whatever is unknown becomes 75, try
# later. Some MTAs show the first line that the command writes, some the last, so it is one
# line, with the end of what Python or this shell complained of. The answer counts, so wait
# for it when the MTA wants us to end.
deliver() {
    trap : HUP INT TERM
    # A shell that cannot fork ends with 2, and runs only this.
    trap 'case $? in
        0 | 65 | 67 | 75 | 77) ;;
        *) echo "4.3.0 mda cannot be started" >&2; exit 75 ;;
        esac' EXIT
    (: 3>&1) 2>/dev/null || exec >/dev/null
    { errors=$("$@" 2>&1 >&3 3>&-); } 3>&1
    status=$?
    case $status in
    0 | 65 | 67 | 75 | 77) ;;
    *)
        errors="4.3.0 mda has failed (exit status $status)${errors:+: ${errors##*
}}"
        status=75
        ;;
    esac
    test -z "$errors" || printf '%s\n' "$errors" >&2
    exit $status
}

# Under inetd standard error is the client's connection: nobody's diagnostics belong there.
leave_client() {
    end=$(readlink /proc/self/fd/2)
    case $end in
    socket:*) test "$end" != "$(readlink /proc/self/fd/0)" || exec 2>/dev/null ;;
    esac
}

command=${1-}
words="$*"
set -- @PROGRAM@ "$@"

# May we limit ourselves? Not in a user's shell, nor in a unit's sandbox, where there is
# nothing to give away; setpriv, if it were only tried there, would complain in the log.
has_setpcap() {
    while read -r name value; do
        case $name$value in CapEff:*[13579bdf]??) return 0 ;; esac
    done </proc/self/status
    return 1
}

# All capabilities but two are given away before anything is read.
case $words in
receive* | deliver* | serve* | queue*turn*)
    limit='setpriv --inh-caps=-all --bounding-set=-all,+setuid,+setgid'
    if has_setpcap && $limit true 2>/dev/null; then
        set -- $limit "$@"
    fi
    ;;
esac

case $command in
receive) leave_client ;;
deliver) deliver "$@" ;;
esac
exec "$@"
