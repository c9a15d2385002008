"""From files to token ids: where records come from, what shapes they have, how they are rendered and masked.

Read in the order in which a record travels: `sources` (files and the Hub), `formats` (record shapes), `chat_tokenizer`
(the chat template, run safely by `template_sandbox`, and the mask of targets), `truncation`, `filters` (duplicates and
the split), `builder` (one pass over it all) and `dataset` (its result, kept in a cache).
"""
