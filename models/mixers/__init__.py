"""Sequence mixers, one file each, with the channel mixers that belong to them (`phyla.models.layers.Layer`).

The state is an explicit pytree of arrays [B, ...]. Training passes None and gets None. Prefill passes
`mixer.initial_state(batch, length)` and gets the state after the last token; decoding is the same call with T = 1.
A change in `segment_ids` (within the call or between calls) starts a new document: nothing of the old one is seen.
"""
