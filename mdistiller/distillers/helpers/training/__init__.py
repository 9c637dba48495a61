"""Settings, gathering over processes, memory banks, and what a method trains."""
