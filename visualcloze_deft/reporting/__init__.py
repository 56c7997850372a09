"""Figures for people: statistics, tables, plots, pages, contact sheets."""
