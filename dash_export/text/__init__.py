"""Text to tokens and back: tokenizer, chat templates, grammars, and the child process that bounds both."""
