#!/bin/sh
# Written by `mda install`, removed by `mda uninstall`: sendmail, mailq and newaliases for a
# host without an MTA.
case ${0##*/} in
mailq) set -- -bp "$@" ;;
newaliases) set -- -bi "$@" ;;
esac
exec /usr/local/bin/mda sendmail "$@"
