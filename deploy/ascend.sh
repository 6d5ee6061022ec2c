# CANN's environment (ASCEND_HOME_PATH, LD_LIBRARY_PATH ...) for every shell of the image, once for a tree of processes:
# CANN's own script prepends to what it finds.
if [ -z "${GS_DIST_CANN:-}" ]; then
    export GS_DIST_CANN="${CANN_SET_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}"
    if [ -f "$GS_DIST_CANN" ]; then
        . "$GS_DIST_CANN"
    fi
fi
