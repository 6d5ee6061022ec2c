# CANN's environment (ASCEND_HOME_PATH, LD_LIBRARY_PATH ...) for every shell of the image, once for a tree of processes:
# CANN's own script prepends to what it finds. Newer CANN lies in /usr/local/Ascend/cann; CANN_SET_ENV names another place.
if [ -z "${GS_DIST_CANN:-}" ]; then
    export GS_DIST_CANN=none
    for script in "${CANN_SET_ENV:-}" /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
        if [ -n "$script" ] && [ -f "$script" ]; then
            GS_DIST_CANN=$script
            . "$script"
            break
        fi
    done
    if [ "$GS_DIST_CANN" = none ]; then
        echo "ascend.sh: found no set_env.sh of CANN${CANN_SET_ENV:+ at $CANN_SET_ENV,} in /usr/local/Ascend:" \
            "set CANN_SET_ENV to its path, or MindSpore finds no card" >&2
    fi
    unset script
fi
