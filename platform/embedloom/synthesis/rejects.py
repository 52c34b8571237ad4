"""Why a row is not kept: every reason there is, with its meaning for the report."""

REASONS = {
    # the engine
    "engine_error": "the engine refused the request: the prompt was too long, or it failed on it",
    "truncated": "max_new_tokens ended the answer before its JSON did",
    "invalid_json": "the answer is not JSON",
    "schema": "JSON of another shape than the prompt asks for",
    # the text itself
    "unusable_characters": "a text holds control characters",
    "empty": "a text has no letter",
    "too_short": "a text is below the length bound",
    "too_long": "a text is above the length bound, or cut off by it",
    "language": "a text is in another language than asked for",
    # against the prompt, the document and the other texts of the row
    "copies_document": "the query stands in the document word for word",
    "echoes_prompt": "a text repeats what the prompt says",
    "repeats_itself": "two texts of the row that must differ are the same",
    "label_leak": "a word of the label stands in the text to classify",
    "untranslated": "a translation is the same as its source",
    "no_question": "the document holds no question of its own",
    # against other rows
    "duplicate": "another row has the same text",
    "near_duplicate": "another row has nearly the same text",
    "contamination": "shares text with an evaluation set",
    "round_trip": "the teacher does not find the document for the query",
    "judge": "the judge's grade is below the threshold",
}
