"""Analyse what runs and jobs leave behind.  It only reads files, and training never imports it."""
