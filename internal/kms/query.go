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
	"unique"

	"github.com/google/uuid"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/record"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// index keeps what lists ask of the keys of each instance that was asked for,
// in the order of their ids. It is brought up to date by what changed, so that
// a page of a large instance costs no reading of all of it.
type index struct {
	mu   sync.Mutex
	inst map[string]*indexed
}

type indexed struct {
	version int64
	sorted  []*listed // never changed once it is given out
}

// listed is what keys are selected and sorted by, and when something is due.
// There is one for each key of the installation: it must be small.
type listed struct {
	id, name, ring string
	aliases        []string
	created        moment
	updated        moment
	rotated        moment
	expires        moment
	deleted        moment
	rotateOn       moment // by policy
	state          int8
	standard       bool
	imported       bool
}

// moment is a time in microseconds since 1970; 0 is none.
type moment int64

func momentOf(t *time.Time) moment {
	if t == nil {
		return 0
	}
	return moment(t.UnixMicro())
}

func (s *Service) moment() moment { return moment(s.late().UnixMicro()) }

// stateAt is the key's state with its expiry taken into account.
func (k *listed) stateAt(now moment) int8 {
	if k.state == stateActive && k.expires != 0 && now >= k.expires {
		return stateDeactivated
	}
	return k.state
}

// listedRecord is what listed needs of a keyRecord.
type listedRecord struct {
	Kind      string        `json:"kind"`
	Name      string        `json:"name"`
	Aliases   []string      `json:"aliases"`
	KeyRing   string        `json:"keyRing"`
	Imported  bool          `json:"imported"`
	State     int8          `json:"state"`
	CreatedAt time.Time     `json:"createdAt"`
	UpdatedAt time.Time     `json:"updatedAt"`
	RotatedAt *time.Time    `json:"rotatedAt"`
	Expires   *time.Time    `json:"expires"`
	DeletedAt *time.Time    `json:"deletedAt"`
	Rotation  *policyRecord `json:"rotation"`
	Version   struct {
		CreatedAt time.Time `json:"createdAt"`
	} `json:"version"`
}

func (r *listedRecord) listed(id string) *listed {
	k := &listed{id: id, name: r.Name, ring: unique.Make(r.KeyRing).Value(), aliases: r.Aliases,
		created: momentOf(&r.CreatedAt), updated: momentOf(&r.UpdatedAt), rotated: momentOf(r.RotatedAt), expires: momentOf(r.Expires), deleted: momentOf(r.DeletedAt),
		state: r.State, standard: r.Kind == kindStandard, imported: r.Imported}
	if r.Rotation != nil && r.Rotation.Enabled && !r.Imported {
		on := r.Version.CreatedAt.Add(time.Duration(r.Rotation.Months) * month)
		k.rotateOn = momentOf(&on)
	}
	return k
}

// keys gives an instance's keys by id. Nobody may change them.
func (x *index) keys(ctx context.Context, s Store, instance string) ([]*listed, error) {
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

// forget drops what is kept of an instance.
func (x *index) forget(instance string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.inst, instance)
}

func list(ctx context.Context, s Store, dir string) (*indexed, error) {
	out := &indexed{version: s.Version(dir)} // before the list: what comes meanwhile is seen twice
	err := s.List(ctx, dir, func(m record.Meta, decode func(v any) error) error {
		var r listedRecord
		if err := decode(&r); err != nil {
			return err
		}
		out.sorted = append(out.sorted, r.listed(m.Name))
		return nil
	})
	return out, err
}

// with is the index after some paths changed.
func (x *indexed) with(ctx context.Context, s Store, paths []string, now int64) (*indexed, error) {
	out := &indexed{version: now, sorted: slices.Clone(x.sorted)}
	for _, p := range paths {
		id := p[strings.LastIndexByte(p, '/')+1:]
		i, there := slices.BinarySearchFunc(out.sorted, id, func(k *listed, id string) int { return cmp.Compare(k.id, id) })
		var r listedRecord
		_, err := s.Get(ctx, p, &r)
		switch {
		case errors.Is(err, record.ErrNotFound):
			if there {
				out.sorted = slices.Delete(out.sorted, i, i+1)
			}
		case err != nil:
			return nil, err
		case there:
			out.sorted[i] = r.listed(id)
		default:
			out.sorted = slices.Insert(out.sorted, i, r.listed(id))
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
	var hits []*listed
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
	for _, hit := range hits {
		k, _, err := s.load(ctx, instance, hit.id)
		if fault.KindOf(err) == fault.NotFound {
			continue // purged this moment
		}
		if err != nil {
			return Page{}, err
		}
		out.Keys = append(out.Keys, s.show(k))
	}
	return out, nil
}

// first gives the n first of keys in an order; keys that are alike stay in the
// order of their ids. To sort all of a large instance for one page would be
// most of the work of the page, so only n are kept at a time.
func first(keys []*listed, n int, less func(a, b *listed) int) []*listed {
	order := func(a, b *listed) int {
		if c := less(a, b); c != 0 {
			return c
		}
		return cmp.Compare(a.id, b.id)
	}
	if n == 0 || n > len(keys)/4 {
		out := slices.Clone(keys)
		slices.SortFunc(out, order)
		return out
	}
	out := make([]*listed, 0, 2*n)
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

func (s *Service) matcher(q Query) (func(*listed) bool, error) {
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
	now := s.moment()
	return func(k *listed) bool {
		return states[k.stateAt(now)] && (q.Extractable == nil || *q.Extractable == k.standard) && (f.extractable == nil || *f.extractable == k.standard) &&
			(q.Ring == "" || q.Ring == k.ring) && f.dates(k)
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
	tests       []func(*listed) bool
}

func (f filter) dates(k *listed) bool {
	for _, t := range f.tests {
		if !t(k) {
			return false
		}
	}
	return true
}

// dateOf are the dates of a key that can be filtered and sorted by.
var dateOf = map[string]func(*listed) moment{
	"creationDate":   func(k *listed) moment { return k.created },
	"lastUpdateDate": func(k *listed) moment { return k.updated },
	"lastRotateDate": func(k *listed) moment { return k.rotated },
	"expirationDate": func(k *listed) moment { return k.expires },
	"deletionDate":   func(k *listed) moment { return k.deleted },
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

func dateTest(date func(*listed) moment, value string) (func(*listed) bool, error) {
	if value == "none" {
		return func(k *listed) bool { return date(k) == 0 }, nil
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
	at := momentOf(&t)
	return func(k *listed) bool { d := date(k); return d != 0 && holds(cmp.Compare(d, at)) }, nil
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
func (s *Service) order(text string) (func(a, b *listed) int, error) {
	if text == "" {
		return nil, nil
	}
	var by []func(a, b *listed) int
	for name := range strings.SplitSeq(text, ",") {
		name, down := strings.CutPrefix(name, "-")
		c := s.comparison(name)
		if c == nil {
			return nil, badQuery("sort", "a comma separated list of id, state, extractable, imported, creationDate, lastUpdateDate, lastRotateDate, deletionDate, expirationDate")
		}
		if down {
			up := c
			c = func(a, b *listed) int { return up(b, a) }
		}
		by = append(by, c)
	}
	return func(a, b *listed) int {
		for _, c := range by {
			if n := c(a, b); n != 0 {
				return n
			}
		}
		return 0
	}, nil
}

func (s *Service) comparison(name string) func(a, b *listed) int {
	flag := func(b bool) int {
		if b {
			return 1
		}
		return 0
	}
	switch name {
	case "id":
		return func(a, b *listed) int { return cmp.Compare(a.id, b.id) }
	case "state":
		now := s.moment()
		return func(a, b *listed) int { return int(a.stateAt(now)) - int(b.stateAt(now)) }
	case "extractable":
		return func(a, b *listed) int { return flag(a.standard) - flag(b.standard) }
	case "imported":
		return func(a, b *listed) int { return flag(a.imported) - flag(b.imported) }
	}
	date := dateOf[name]
	if date == nil {
		return nil
	}
	return func(a, b *listed) int { // keys without the date come last
		da, db := date(a), date(b)
		switch {
		case da == 0 || db == 0:
			return flag(da == 0) - flag(db == 0)
		default:
			return cmp.Compare(da, db)
		}
	}
}

// search keeps the keys whose name or alias matches. A key that the text names
// by id, or in alias scope by alias, comes first even when there are too many
// keys to look at.
func search(hits []*listed, text string, out *Page) ([]*listed, error) {
	q, err := parseSearch(text)
	if err != nil {
		return nil, err
	}
	out.Search = &q
	alias := slices.Equal(q.Scopes, []string{"alias"})
	named := slices.IndexFunc(hits, func(k *listed) bool {
		return k.id == strings.ToLower(q.Query) || alias && slices.Contains(k.aliases, q.Query)
	})
	var first []*listed
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

func matches(k *listed, q kmsapi.SearchQuery) bool {
	fits := func(s string) bool {
		if q.Exact {
			return strings.EqualFold(s, q.Query)
		}
		return strings.Contains(strings.ToLower(s), strings.ToLower(q.Query))
	}
	hit := slices.Contains(q.Scopes, "name") && fits(k.name) || slices.Contains(q.Scopes, "alias") && slices.ContainsFunc(k.aliases, fits)
	return hit != q.Not
}
