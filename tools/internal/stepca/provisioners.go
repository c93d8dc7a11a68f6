package stepca

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
)

const (
	// step-ca gives at most 100 at a time (authority/provisioner/collection.go). Fewer
	// leave room for bundles of roots within maxBody.
	pageSize = "20"
	maxPages = 100
)

// Provisioners returns what the CA says about each of its provisioners, as JSON
// objects, in step-ca's order: that of a hash.
func (c *Client) Provisioners(ctx context.Context) ([]json.RawMessage, error) {
	var all []json.RawMessage
	cursor := ""
	for range maxPages {
		var page struct {
			Provisioners []json.RawMessage `json:"provisioners"`
			NextCursor   string            `json:"nextCursor"`
		}
		query := url.Values{"limit": {pageSize}, "cursor": {cursor}}
		if err := c.json(ctx, c.http, http.MethodGet, "/provisioners?"+query.Encode(), nil, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Provisioners...)
		if cursor = page.NextCursor; cursor == "" {
			return all, nil
		}
	}
	return nil, fmt.Errorf("asking %q: the list has no end", c.base+"/provisioners")
}
