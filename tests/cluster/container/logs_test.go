package main

import "testing"

func TestTailGivesTheLastLines(t *testing.T) {
	for _, c := range []struct {
		content string
		lines   int
		want    string
	}{
		{"a\nb\nc\n", 2, "b\nc\n"}, {"a\nb\nc", 2, "b\nc"}, {"a\nb\n", 5, "a\nb\n"}, {"a\n", 1, "a\n"}, {"a\n", 0, ""}, {"", 3, ""},
	} {
		if got := string(tail([]byte(c.content), c.lines)); got != c.want {
			t.Errorf("tail(%q, %d) = %q, want %q", c.content, c.lines, got, c.want)
		}
	}
}
