"""`mindspore_gs.ptq.network_helpers.mf_net_helpers`: says what takes the place of MindFormers' helpers."""

from gs_dist.golden_stick.absent import missing_names

_INSTEAD = (
    "gs_dist does not depend on MindFormers. For a Hugging Face directory use gs_dist.ptq.DecoderHelper(directory), "
    "whose create_network, create_tokenizer and get_spec take its place; for a MindFormers network, subclass "
    "NetworkHelper, or give apply no helper: rows with a column input_ids then drive the network itself"
)
__getattr__ = missing_names(
    __name__,
    dict.fromkeys(
        (
            "MFNetworkHelper",
            "MFLlama2Helper",
            "MFParallelLlama2Helper",
            "MFParallelTeleChat2Helper",
            "MFDSV3Helper",
            "Qwen3Helper",
        ),
        _INSTEAD,
    ),
)
