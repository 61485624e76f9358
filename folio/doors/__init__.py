"""The commands of build-nanogpt and GPT-from-scratch."""
