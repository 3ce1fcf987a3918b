"""Looking at what runs and jobs left behind.  Reads files; training never imports it."""
