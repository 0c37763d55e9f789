"""Draft heads: small networks on the target's last feature that guess tokens further ahead.

Every kind has the same four functions, which training and decoding both call, so that what is measured in training is
what is served: `init`, `features` (what the heads read, from the target's post-norm features), `hidden` (head i on a
feature and the tokens of its path) and `vocab` (its logits).
"""
