package push

// Known remembers layers of earlier runs: what a layer that begins so became
// in the registry, or the empty Layer where that cannot be told by how it
// begins. It is safe to lose, and what it says is checked.
type Known interface {
	Load(key string) (Layer, bool)
	Save(key string, l Layer)
}

// Layer is a layer as it went into a registry.
type Layer struct {
	DiffID    string `json:"diffID"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
	MediaType string `json:"mediaType"`
}
