package kms

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// index keeps the keys of each instance that was asked for decoded, in the
// order of their ids. It is brought up to date by what changed, so that a page
// of a large instance costs no reading of all of it.
type index struct {
	mu   sync.Mutex
	inst map[string]*indexed
}

type indexed struct {
	version int64
	sorted  []*keyRecord // never changed once it is given out
}

// keys gives an instance's keys by id. Nobody may change them.
func (x *index) keys(ctx context.Context, s Store, instance string) ([]*keyRecord, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	dir := keyPath(instance, "")
	have := x.inst[instance]
	if have != nil && have.version == s.Version(dir) {
		return have.sorted, nil
	}
	var err error
	if have == nil {
		have, err = list(ctx, s, dir)
	} else if paths, now, ok := s.Since(dir, have.version); ok {
		have, err = have.with(ctx, s, paths, now)
	} else {
		have, err = list(ctx, s, dir)
	}
	if err != nil {
		return nil, err
	}
	if x.inst == nil {
		x.inst = map[string]*indexed{}
	}
	x.inst[instance] = have
	return have.sorted, nil
}

func list(ctx context.Context, s Store, dir string) (*indexed, error) {
	out := &indexed{version: s.Version(dir)} // before the list: what comes meanwhile is seen twice
	err := s.List(ctx, dir, func(_ record.Meta, decode func(any) error) error {
		k := &keyRecord{}
		out.sorted = append(out.sorted, k)
		return decode(k)
	})
	return out, err
}

// with is the index after some paths changed.
func (x *indexed) with(ctx context.Context, s Store, paths []string, now int64) (*indexed, error) {
	out := &indexed{version: now, sorted: slices.Clone(x.sorted)}
	for _, p := range paths {
		id := p[strings.LastIndexByte(p, '/')+1:]
		i, there := slices.BinarySearchFunc(out.sorted, id, func(k *keyRecord, id string) int { return cmp.Compare(k.ID, id) })
		k := &keyRecord{}
		_, err := s.Get(ctx, p, k)
		switch {
		case errors.Is(err, record.ErrNotFound):
			if there {
				out.sorted = slices.Delete(out.sorted, i, i+1)
			}
		case err != nil:
			return nil, err
		case there:
			out.sorted[i] = k
		default:
			out.sorted = slices.Insert(out.sorted, i, k)
		}
	}
	return out, nil
}

// Query selects keys of a list. A nil Extractable or empty States means any of
// the states that are shown by default (1, 2, 3). An empty Ring means all.
type Query struct {
	Limit, Offset int
	States        []int
	Extractable   *bool
	Ring          string
	Search        string
	Sort          string
	Filter        string
}

// Page is a part of a list.
type Page struct {
	Keys       []kmsapi.Key
	Total      int // before limit and offset
	Search     *kmsapi.SearchQuery
	Incomplete bool // too many keys to search: only those that were looked up by name
}

// Keys lists an instance's keys, by id unless sorted otherwise.
func (s *Service) Keys(ctx context.Context, instance string, q Query) (Page, error) {
	if _, err := s.Instance(ctx, instance); err != nil {
		return Page{}, err
	}
	match, err := s.matcher(q)
	if err != nil {
		return Page{}, err
	}
	less, err := s.order(q.Sort)
	if err != nil {
		return Page{}, err
	}
	all, err := s.index.keys(ctx, s.store, instance)
	if err != nil {
		return Page{}, err
	}
	var hits []*keyRecord
	out := Page{Keys: []kmsapi.Key{}}
	if less == nil && q.Search == "" {
		// The usual case: one pass, and only the page is built.
		for _, k := range all {
			if match(k) {
				if out.Total++; out.Total > q.Offset && len(hits) < q.Limit {
					hits = append(hits, k)
				}
			}
		}
	} else {
		for _, k := range all {
			if match(k) {
				hits = append(hits, k)
			}
		}
		if q.Search != "" {
			if hits, err = search(hits, q.Search, &out); err != nil {
				return Page{}, err
			}
		}
		out.Total = len(hits)
		if less != nil {
			hits = first(hits, q.Limit+q.Offset, less)
		}
		hits = page(hits, q.Limit, q.Offset)
	}
	for _, k := range hits {
		out.Keys = append(out.Keys, s.show(k))
	}
	return out, nil
}

// first gives the n first of keys in an order; keys that are alike stay in the
// order of their ids. To sort all of a large instance for one page would be
// most of the work of the page, so only n are kept at a time.
func first(keys []*keyRecord, n int, less func(a, b *keyRecord) int) []*keyRecord {
	order := func(a, b *keyRecord) int {
		if c := less(a, b); c != 0 {
			return c
		}
		return cmp.Compare(a.ID, b.ID)
	}
	if n == 0 || n > len(keys)/4 {
		out := slices.Clone(keys)
		slices.SortFunc(out, order)
		return out
	}
	out := make([]*keyRecord, 0, 2*n)
	for _, k := range keys {
		if len(out) >= n && order(out[n-1], k) <= 0 {
			continue // it comes after the n that are known
		}
		if out = append(out, k); len(out) == 2*n || len(out) == n {
			slices.SortFunc(out, order)
			out = out[:n]
		}
	}
	slices.SortFunc(out, order)
	return out[:min(n, len(out))]
}

func (s *Service) matcher(q Query) (func(*keyRecord) bool, error) {
	f, err := s.filter(q.Filter)
	if err != nil {
		return nil, err
	}
	states := [6]bool{1: true, 2: true, 3: true}
	if f.states != nil && len(q.States) == 0 {
		q.States = f.states
	}
	if len(q.States) > 0 {
		states = [6]bool{}
		for _, n := range q.States {
			states[n] = true
		}
	}
	return func(k *keyRecord) bool {
		std := k.Kind == kindStandard
		return states[s.stateNow(k)] && (q.Extractable == nil || *q.Extractable == std) && (f.extractable == nil || *f.extractable == std) &&
			(q.Ring == "" || q.Ring == k.KeyRing) && f.dates(k)
	}, nil
}

func badQuery(name, format string, a ...any) error {
	return fault.Newf(fault.Usage, "", "", "The query_param `%s` must be: %s", name, fmt.Sprintf(format, a...)).WithReason(kmsapi.InvalidQuery)
}

// filter is what the query's filter says: blank-separated terms such as
// creationDate=gt:"2026-01-02T03:04:05Z", state=1,2 and extractable=true.
type filter struct {
	states      []int
	extractable *bool
	tests       []func(*keyRecord) bool
}

func (f filter) dates(k *keyRecord) bool {
	for _, t := range f.tests {
		if !t(k) {
			return false
		}
	}
	return true
}

// dateOf are the dates of a key that can be filtered and sorted by.
var dateOf = map[string]func(*keyRecord) *time.Time{
	"creationDate":   func(k *keyRecord) *time.Time { return &k.CreatedAt },
	"lastUpdateDate": func(k *keyRecord) *time.Time { return &k.UpdatedAt },
	"lastRotateDate": func(k *keyRecord) *time.Time { return k.RotatedAt },
	"expirationDate": func(k *keyRecord) *time.Time { return k.Expires },
	"deletionDate":   func(k *keyRecord) *time.Time { return k.DeletedAt },
}

func (s *Service) filter(text string) (f filter, err error) {
	if len(text) > 1024 {
		return f, badQuery("filter", "at most 1024 characters")
	}
	for _, term := range strings.Fields(text) {
		name, value, ok := strings.Cut(term, "=")
		switch date := dateOf[name]; {
		case !ok || value == "":
			return f, badQuery("filter", "terms of the form name=value")
		case name == "state":
			if f.states, err = ParseStates("filter", value); err != nil {
				return f, err
			}
		case name == "extractable":
			b := value == "true"
			if !b && value != "false" {
				return f, badQuery("filter", "extractable=true or extractable=false")
			}
			f.extractable = &b
		case date != nil:
			t, err := dateTest(date, value)
			if err != nil {
				return f, err
			}
			f.tests = append(f.tests, t)
		default:
			return f, badQuery("filter", "about state, extractable or a date, and not about %q", name)
		}
	}
	return f, nil
}

func dateTest(date func(*keyRecord) *time.Time, value string) (func(*keyRecord) bool, error) {
	if value == "none" {
		return func(k *keyRecord) bool { return date(k) == nil }, nil
	}
	op := "eq"
	for _, o := range []string{"gte", "lte", "gt", "lt"} {
		if rest, ok := strings.CutPrefix(value, o+":"); ok {
			op, value = o, rest
			break
		}
	}
	t, err := time.Parse(time.RFC3339Nano, strings.Trim(value, `"`))
	if err != nil {
		return nil, badQuery("filter", "dates as in gt:\"2026-01-02T03:04:05Z\"")
	}
	holds := map[string]func(int) bool{"gt": func(c int) bool { return c > 0 }, "gte": func(c int) bool { return c >= 0 },
		"lt": func(c int) bool { return c < 0 }, "lte": func(c int) bool { return c <= 0 }, "eq": func(c int) bool { return c == 0 }}[op]
	return func(k *keyRecord) bool { d := date(k); return d != nil && holds(d.Compare(t)) }, nil
}

// ParseStates reads a comma-separated list of states.
func ParseStates(param, text string) ([]int, error) {
	var out []int
	for part := range strings.SplitSeq(text, ",") {
		if len(part) != 1 || part[0] < '0' || part[0] > '5' {
			return nil, badQuery(param, "a comma separated list of states between 0 and 5")
		}
		out = append(out, int(part[0]-'0'))
	}
	return out, nil
}

// order is the comparison of a sort parameter; nil when there is none.
func (s *Service) order(text string) (func(a, b *keyRecord) int, error) {
	if text == "" {
		return nil, nil
	}
	var by []func(a, b *keyRecord) int
	for name := range strings.SplitSeq(text, ",") {
		name, down := strings.CutPrefix(name, "-")
		c := s.comparison(name)
		if c == nil {
			return nil, badQuery("sort", "a comma separated list of id, state, extractable, imported, creationDate, lastUpdateDate, lastRotateDate, deletionDate, expirationDate")
		}
		if down {
			up := c
			c = func(a, b *keyRecord) int { return up(b, a) }
		}
		by = append(by, c)
	}
	return func(a, b *keyRecord) int {
		for _, c := range by {
			if n := c(a, b); n != 0 {
				return n
			}
		}
		return 0
	}, nil
}

func (s *Service) comparison(name string) func(a, b *keyRecord) int {
	flag := func(b bool) int {
		if b {
			return 1
		}
		return 0
	}
	switch name {
	case "id":
		return func(a, b *keyRecord) int { return cmp.Compare(a.ID, b.ID) }
	case "state":
		return func(a, b *keyRecord) int { return s.stateNow(a) - s.stateNow(b) }
	case "extractable":
		return func(a, b *keyRecord) int { return flag(a.Kind == kindStandard) - flag(b.Kind == kindStandard) }
	case "imported":
		return func(a, b *keyRecord) int { return flag(a.Imported) - flag(b.Imported) }
	}
	date := dateOf[name]
	if date == nil {
		return nil
	}
	return func(a, b *keyRecord) int { // keys without the date come last
		da, db := date(a), date(b)
		switch {
		case da == nil || db == nil:
			return flag(da == nil) - flag(db == nil)
		default:
			return da.Compare(*db)
		}
	}
}

// search keeps the keys whose name or alias matches. A key that the text names
// by id, or in alias scope by alias, comes first even when there are too many
// keys to look at.
func search(hits []*keyRecord, text string, out *Page) ([]*keyRecord, error) {
	q, err := parseSearch(text)
	if err != nil {
		return nil, err
	}
	out.Search = &q
	alias := slices.Equal(q.Scopes, []string{"alias"})
	named := slices.IndexFunc(hits, func(k *keyRecord) bool {
		return k.ID == strings.ToLower(q.Query) || alias && slices.Contains(k.Aliases, q.Query)
	})
	var first []*keyRecord
	if named >= 0 && (alias || uuid.Validate(q.Query) == nil) && !q.Not {
		first = hits[named : named+1]
	}
	if len(hits) > kmsapi.MaxCandidates {
		if first == nil {
			return nil, refusal(fault.Usage, "", kmsapi.SearchTooBroad)
		}
		out.Incomplete = true
		return first, nil
	}
	found := slices.Clone(first)
	for _, k := range hits {
		if matches(k, q) && (first == nil || k != first[0]) {
			found = append(found, k)
		}
	}
	return found, nil
}

func parseSearch(text string) (kmsapi.SearchQuery, error) {
	q := kmsapi.SearchQuery{}
	text = strings.TrimSuffix(text, ",") // IBM's Go client adds it
	for {
		word, rest, ok := strings.Cut(text, ":")
		if !ok {
			break
		}
		switch word {
		case "not":
			q.Not = true
		case "exact":
			q.Exact = true
		case "alias", "name":
			if !slices.Contains(q.Scopes, word) {
				q.Scopes = append(q.Scopes, word)
			}
		case "escape":
			text = rest
			ok = false
		default:
			ok = false
		}
		if !ok {
			break
		}
		text = rest
	}
	if len(q.Scopes) == 0 {
		q.Scopes = []string{"name", "alias"}
	}
	q.Query = text
	if text == "" || len(text) > 256 {
		return q, badQuery("search", "between 1 and 256 characters to look for")
	}
	return q, nil
}

func matches(k *keyRecord, q kmsapi.SearchQuery) bool {
	fits := func(s string) bool {
		if q.Exact {
			return strings.EqualFold(s, q.Query)
		}
		return strings.Contains(strings.ToLower(s), strings.ToLower(q.Query))
	}
	hit := slices.Contains(q.Scopes, "name") && fits(k.Name) || slices.Contains(q.Scopes, "alias") && slices.ContainsFunc(k.Aliases, fits)
	return hit != q.Not
}
