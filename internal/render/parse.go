package render

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/secret"
	"github.com/kmsctl/kmsctl/templates"
)

// Keys of hsm-secret, as the manual names them.
const (
	passKey     = "hsm-pass"
	serverCAKey = "ServerCAFile"
	keySuffix   = "-key"
)

// ParseSecret reads hsm-Secret.yaml. The manual's printed samples load, with
// warnings: namespace outside metadata (nShield), no type (SoftHSM).
func ParseSecret(b []byte) (Secret, error) {
	var s Secret
	doc, err := decode(b)
	if err != nil {
		return s, err
	}
	if err := checkKeys(doc, map[string]any{"apiVersion": nil, "kind": nil, "type": nil, "metadata": map[string]any{}, "data": map[string]any{},
		"stringData": map[string]any{}, "immutable": nil, "namespace": nil}, ""); err != nil {
		return s, err
	}
	if doc["kind"] != "Secret" {
		return s, fmt.Errorf("kind is %v, not Secret", doc["kind"])
	}
	meta, _ := doc["metadata"].(map[string]any)
	if name := meta["name"]; name != SecretName {
		return s, fmt.Errorf("metadata.name is %v, not %s", name, SecretName)
	}
	s.Namespace, _ = meta["namespace"].(string)
	if ns, ok := doc["namespace"].(string); ok {
		s.Warnings = append(s.Warnings, "namespace stands outside metadata, where Kubernetes ignores it; read as metadata.namespace")
		if s.Namespace == "" {
			s.Namespace = ns
		}
	}
	switch doc["type"] {
	case "Opaque":
	case nil:
		s.Warnings = append(s.Warnings, "type is absent; read as Opaque")
	default:
		return s, fmt.Errorf("type is %v, not Opaque", doc["type"])
	}
	data, err := secretData(doc)
	if err != nil {
		return s, err
	}
	return s, s.fill(data)
}

// secretData joins data (base64) and stringData (plain) as the API server does.
func secretData(doc map[string]any) (map[string][]byte, error) {
	out := map[string][]byte{}
	plain, _ := doc["stringData"].(map[string]any)
	enc, _ := doc["data"].(map[string]any)
	for k, v := range enc {
		s, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("data.%s is not a string", k)
		}
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			// The cause would show where, but also invite printing the text.
			return nil, fmt.Errorf("data.%s is not base64", k)
		}
		out[k] = b
	}
	for k, v := range plain {
		s, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("stringData.%s is not a string", k)
		}
		out[k] = []byte(s)
	}
	return out, nil
}

// SecretFromData reads the data of an hsm-secret of the cluster.
func SecretFromData(namespace string, data map[string][]byte) (Secret, error) {
	s := Secret{Namespace: namespace}
	return s, s.fill(data)
}

func (s *Secret) fill(data map[string][]byte) error {
	var errs []error
	s.Clients = map[string]Pair{}
	for _, k := range slices.Sorted(maps.Keys(data)) {
		v := data[k]
		switch k {
		case passKey:
			s.Password = secret.New(v)
		case serverCAKey:
			s.ServerCA = v
		default:
			ip, isKey := strings.CutSuffix(k, keySuffix)
			if a, err := netip.ParseAddr(ip); err != nil || !a.Is4() { // a Secret's key may hold no colon
				errs = append(errs, unknownKey("data."+k, k, []string{passKey, serverCAKey}, "or the IPv4 address of a management node"))
				continue
			}
			p := s.Clients[ip]
			if isKey {
				p.Key = v
			} else {
				p.Cert = v
			}
			s.Clients[ip] = p
		}
	}
	if s.Password.Empty() {
		errs = append(errs, fmt.Errorf("data.%s is missing", passKey))
	}
	for ip, p := range s.Clients {
		if len(p.Cert) == 0 || len(p.Key) == 0 {
			errs = append(errs, fmt.Errorf("node %s has only one of %s and %s%s", ip, ip, ip, keySuffix))
		}
	}
	return errors.Join(errs...)
}

// ParseOverrides reads overrides_hsm.yaml: the manual's keys and those of our
// chart; any other is an error that names the nearest known one.
func ParseOverrides(b []byte) (Overrides, error) {
	var o Overrides
	doc, err := decode(b)
	if err != nil {
		return o, err
	}
	known, err := chartValues()
	if err != nil {
		return o, err
	}
	known["hsm"].(map[string]any)["hsm_pw"] = nil
	known["client_certs"] = nil
	if err := checkKeys(doc, known, ""); err != nil {
		return o, err
	}
	block, ok := doc["hsm"].(map[string]any)
	if !ok {
		return o, errors.New("the block hsm is missing")
	}
	if err := o.readHSM(block); err != nil {
		return o, err
	}
	if err := o.readImages(doc); err != nil {
		return o, err
	}
	if err := o.readClients(doc["client_certs"]); err != nil {
		return o, err
	}
	delete(doc, "client_certs")
	delete(block, "hsm_pw")
	delete(block, "clear_data")
	o.Values, _ = plain(doc).(map[string]any)
	return o, nil
}

// plain makes numbers what Helm's templates expect.
func plain(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			v[k] = plain(x)
		}
	case []any:
		for i, x := range v {
			v[i] = plain(x)
		}
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		if f, err := v.Float64(); err == nil {
			return f
		}
		return v.String()
	}
	return v
}

func (o *Overrides) readHSM(block map[string]any) error {
	text := func(key string) string {
		switch v := block[key].(type) {
		case string:
			return v
		case json.Number:
			if key == "slotId" {
				o.Warnings = append(o.Warnings, "hsm.slotId is a number; the chart wants a string: put it in quotes")
				block[key] = v.String()
			}
			return v.String()
		}
		return ""
	}
	flag := func(key string) (bool, error) {
		switch v := block[key].(type) {
		case nil:
			return false, nil
		case bool:
			return v, nil
		}
		return false, fmt.Errorf("hsm.%s is not true or false", key)
	}
	clearData, err1 := flag("clear_data")
	fips, err2 := flag("fips")
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	o.HSM = hsm.Settings{Model: text("hsm_model"), HSMIP: text("hsm_ip"), RFSIP: text("rfs_ip"), SlotID: text("slotId"), ClearData: clearData,
		ESN: text("esn"), KeyHash: text("keyhash"), TokenLabel: text("tokenLabel"), FIPS: fips}
	if pw := text("hsm_pw"); pw != "" {
		o.Password = secret.New([]byte(pw))
		o.Warnings = append(o.Warnings, "hsm.hsm_pw: moved into the Secret hsm-secret; take it out of this file")
	}
	if o.HSM.Model == "" {
		return errors.New("hsm.hsm_model is missing")
	}
	_, err := hsm.Lookup(o.HSM.Model)
	return err
}

func (o *Overrides) readImages(doc map[string]any) error {
	o.Images = map[string]Image{}
	for _, name := range append([]string{"oss", "storage", "watcher"}, hsm.Names()...) {
		block, ok := doc[name].(map[string]any)
		if !ok {
			continue
		}
		img, ok := block["image"].(map[string]any)
		if !ok {
			continue
		}
		repo, _ := img["repository"].(string)
		if clean := strings.ReplaceAll(repo, " ", ""); clean != repo {
			o.Warnings = append(o.Warnings, fmt.Sprintf("%s.image.repository %q has a blank in it; read as %q", name, repo, clean))
			repo, img["repository"] = clean, clean
		}
		tag := ""
		switch v := img["tag"].(type) {
		case string:
			tag = v
		case json.Number:
			o.Warnings = append(o.Warnings, fmt.Sprintf("%s.image.tag is a number; read as %q: put it in quotes", name, v))
			tag, img["tag"] = v.String(), v.String()
		}
		if strings.ContainsAny(repo+tag, "<>") {
			return fmt.Errorf("%s.image still has a placeholder: %s:%s", name, repo, tag)
		}
		o.Images[name] = Image{Block: name, Repository: repo, Tag: tag}
	}
	return nil
}

// readClients reads client_certs, which the manual names and never shows: a
// list of ip, cert and key, the latter two in base64.
func (o *Overrides) readClients(v any) error {
	if v == nil {
		return nil
	}
	const shape = "client_certs must be a list of {ip, cert, key}, cert and key in base64"
	list, ok := v.([]any)
	if !ok {
		return errors.New(shape)
	}
	o.Clients = map[string]Pair{}
	for i, e := range list {
		m, ok := e.(map[string]any)
		if !ok {
			return errors.New(shape)
		}
		if err := checkKeys(m, map[string]any{"ip": nil, "cert": nil, "key": nil}, fmt.Sprintf("client_certs[%d].", i)); err != nil {
			return err
		}
		ip, _ := m["ip"].(string)
		if a, err := netip.ParseAddr(ip); err != nil || !a.Is4() {
			return fmt.Errorf("client_certs[%d].ip is not an IPv4 address: %s", i, shape)
		}
		part := func(key string) ([]byte, error) {
			s, _ := m[key].(string)
			b, err := base64.StdEncoding.DecodeString(s)
			if err != nil || len(b) == 0 {
				return nil, fmt.Errorf("client_certs[%d].%s is not base64: %s", i, key, shape)
			}
			return b, nil
		}
		cert, err1 := part("cert")
		key, err2 := part("key")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		o.Clients[ip] = Pair{Cert: cert, Key: key}
	}
	o.Warnings = append(o.Warnings, "client_certs: moved into the Secret hsm-secret; take them out of this file")
	return nil
}

// chartValues are the embedded chart's values: the keys that may be set.
func chartValues() (map[string]any, error) {
	b, err := fs.ReadFile(templates.Chart(), "values.yaml")
	if err != nil {
		return nil, err
	}
	return decode(b)
}

// decode reads one YAML mapping; a key given twice is an error, numbers keep
// all their digits.
func decode(b []byte) (map[string]any, error) {
	var probe map[string]any
	if err := yaml.UnmarshalStrict(b, &probe); err != nil {
		return nil, fmt.Errorf("not a YAML mapping: %w", masked(err))
	}
	j, err := yaml.YAMLToJSON(b)
	if err != nil {
		return nil, fmt.Errorf("not a YAML mapping: %w", masked(err))
	}
	d := json.NewDecoder(bytes.NewReader(j))
	d.UseNumber()
	var doc map[string]any
	if err := d.Decode(&doc); err != nil {
		return nil, fmt.Errorf("not a YAML mapping: %w", masked(err))
	}
	if len(doc) == 0 {
		return nil, errors.New("the file is empty")
	}
	return doc, nil
}

// masked keeps the place of a YAML fault and drops the text, which may be a
// password.
func masked(err error) error {
	s := err.Error()
	if i := strings.Index(s, "line "); i >= 0 {
		rest := s[i+len("line "):]
		end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
		if end > 0 {
			if n, err := strconv.Atoi(rest[:end]); err == nil {
				return fmt.Errorf("fault in line %d", n)
			}
		}
	}
	return errors.New("it cannot be read")
}

// checkKeys refuses keys of got that known lacks. An empty mapping in known is
// free in form; so is a value that is no mapping.
func checkKeys(got, known map[string]any, path string) error {
	var errs []error
	for _, k := range slices.Sorted(maps.Keys(got)) {
		want, ok := known[k]
		if !ok {
			errs = append(errs, unknownKey(path+k, k, slices.Sorted(maps.Keys(known)), ""))
			continue
		}
		w, isMap := want.(map[string]any)
		g, given := got[k].(map[string]any)
		switch {
		case isMap && len(w) > 0 && given:
			errs = append(errs, checkKeys(g, w, path+k+"."))
		case isMap && !given && got[k] != nil:
			errs = append(errs, fmt.Errorf("%s%s must be a mapping", path, k))
		}
	}
	return errors.Join(errs...)
}

func unknownKey(path, key string, known []string, more string) error {
	hint := "known here: " + strings.Join(known, ", ")
	if more != "" {
		hint += ", " + more
	}
	if n := Nearest(key, known); n != "" {
		hint = fmt.Sprintf("did you mean %s?", n)
	}
	return fault.Usagef("unknown key %s", path).WithHint("%s", hint)
}

// Nearest is the known word that is most like word, or "" when none is near.
func Nearest(word string, known []string) string {
	best, at := len(word)/2+1, ""
	for _, k := range known {
		if d := distance(strings.ToLower(word), strings.ToLower(k)); d < best {
			best, at = d, k
		}
	}
	return at
}

// distance is Levenshtein's, on bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j+1]+1, row[j]+1, diag+cost)
			diag, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
