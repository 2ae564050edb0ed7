"""The harness: everything that is the same for every agent. No agent imports it."""
